"""The backward pass of one step, whole or in micro-batches, written once for all methods.

Losses are divided by *global* counts, so the gradient does not depend on how the batch is split over ranks and
micro-batches. Losses that compare samples across the batch (`Outputs.shared`) go through cached gradients (Gao et
al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"): embed everything without a
graph, take the loss's gradient with respect to the embeddings, then embed again part by part and pull it back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from altsight.core.dist import sum_over_ranks, world
from altsight.core.errors import UserError
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.methods.base import Method

Losses = dict[str, Tensor]


class Accumulator:
    """Computes the gradients of one global batch into `method`'s parameters.

    Args:
        method: the method; holds the loss.
        model: (batch, key) -> Outputs, the method's `embed`, possibly wrapped by DDP.
        micro_batch: samples at a time; 0: this rank's whole part.
        autocast: makes the context in which `model` runs; losses over `shared` run outside of it, in fp32.

    Raises:
        UserError: the encoder normalises over the batch and `micro_batch` would split it.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        seed: int,
        micro_batch: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if micro_batch and method.encoder.normalizes_batch:
            raise UserError(
                f"'{method.encoder.config.model}' normalises over what is computed at a time (batch norm), so a batch "
                "cannot be split: leave --train.micro-batch at 0 or take an encoder without batch norm."
            )
        self.method, self.model, self.seed = method, model, seed
        self.micro_batch, self.autocast = micro_batch, autocast

    def __call__(self, batch: Batch) -> tuple[Losses, Losses]:
        """Add the gradient of the global batch to `.grad`.

        Returns:
            (losses, counts): this rank's share of each loss, un-weighted, detached; the global denominators.
        """
        size = self.micro_batch or len(batch)
        parts = [batch.part(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
        counts = self._global_counts(parts)
        backward = self._cached if len(parts) > 1 and self.method.shares else self._plain
        return backward(parts, counts), counts

    def _global_counts(self, parts: list[Batch]) -> Losses:
        per_part = [self.method.counts(part) for part in parts]
        names = list(per_part[0])
        if not names:
            return {}
        total = torch.stack([torch.stack([c[name].float() for c in per_part]).sum() for name in names])
        # At least 1: a global batch without a single target (all captions empty) has a loss of 0, not of 0 / 0.
        return dict(zip(names, sum_over_ranks(total).clamp_min(1), strict=True))

    def _plain(self, parts: list[Batch], counts: Losses) -> Losses:
        """One graph a part; the whole batch is the case of a single part."""
        losses: Losses = {}
        for number, part in enumerate(parts):
            with self._sync_if(number == len(parts) - 1):
                out = self._embed(part)
                terms = {name: value / counts[name] for name, value in out.local.items()}
                if out.shared:
                    terms |= self.method.loss(out.shared)
                self._total(terms).backward()
            _add(losses, terms)
        return losses

    def _cached(self, parts: list[Batch], counts: Losses) -> Losses:
        with torch.no_grad():
            embedded = [self._embed(part).shared for part in parts]
        leaves = {name: torch.cat([e[name] for e in embedded]) for name in embedded[0]}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        pulled = [name for name, leaf in leaves.items() if leaf.requires_grad]
        losses = self.method.loss(leaves)
        # Parameters of the loss itself (a temperature) are leaves like the embeddings.
        own = [p for p in self.method.parameters() if p.requires_grad]
        inputs = [*(leaves[name] for name in pulled), *own]
        grads = torch.autograd.grad(self._total(losses), inputs, allow_unused=True)
        pulls = dict(zip(pulled, grads[: len(pulled)], strict=True))
        own_pull = [(p * g).sum() for p, g in zip(own, grads[len(pulled) :], strict=True) if g is not None]
        losses = {name: value.detach() for name, value in losses.items()}
        done = dict.fromkeys(pulled, 0)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._sync_if(last):
                out = self._embed(part)
                terms = {name: value / counts[name] for name, value in out.local.items()}
                surrogate = self._total(terms) if terms else torch.zeros(())
                for name, pull in pulls.items():
                    rows = len(embedded[number][name])
                    if pull is not None:
                        surrogate = surrogate + (out.shared[name] * pull[done[name] : done[name] + rows]).sum()
                    done[name] += rows
                if last:
                    surrogate = surrogate + sum(own_pull)
                surrogate.backward()
            _add(losses, terms)
        return losses

    def _embed(self, part: Batch) -> Outputs:
        at = key(self.seed, int(part.positions[0]), "embed")
        with torch_seeded(at), self.autocast():
            return self.model(part, at)

    def _total(self, terms: Losses) -> Tensor:
        # DDP averages gradients over ranks; the shares of all ranks add up to the loss.
        weights = self.method.weights()
        return torch.stack([weights.get(name, 1.0) * value for name, value in terms.items()]).sum() * world().size

    def _sync_if(self, sync: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not sync:
            return self.model.no_sync()
        return nullcontext()


class Embed(nn.Module):
    """`Method.embed` as a module's forward, which is what DDP wraps."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, at: Key) -> Outputs:
        """Return the method's outputs for one micro-batch."""
        return self.method.embed(batch, at)


def _add(losses: Losses, terms: Losses) -> None:
    for name, value in terms.items():
        losses[name] = losses[name] + value.detach() if name in losses else value.detach()
