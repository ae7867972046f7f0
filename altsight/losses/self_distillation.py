"""Self-distillation: a student predicts its teacher's distribution over prototypes.

Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Oquab et al. 2023 (DINOv2); specification B8-B10 and 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.dist import gather, sum_over_ranks
from altsight.core.types import Progress

ITERATIONS = 3
"""Rounds of Sinkhorn-Knopp."""


def view_ce(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of every sample, averaged over all pairs of two different views: (B,) fp32.

    Args:
        student: (B, V, K) logits; the first T views are those that the teacher sees.
        targets: (B, T, K) the teacher's distributions.
        temperature: that of the student's softmax.
    """
    pairs = -torch.einsum("btk,bvk->btv", targets, F.log_softmax(student.float() / temperature, dim=-1))
    different = ~torch.eye(*pairs.shape[1:], dtype=torch.bool, device=pairs.device)
    return pairs[:, different].mean(dim=1)


def masked_ce_sum(student: Tensor, targets: Tensor, masked: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy averaged over the masked patches of a crop, summed over the crops (0-d, fp32).

    Args:
        student: (M, K) logits of the masked patches of all crops.
        targets: (M, K) the teacher's distributions at the same places.
        masked: (M,) number of masked patches in the crop that the row is from.
        temperature: that of the student's softmax.
    """
    rows = -(targets * F.log_softmax(student.float() / temperature, dim=-1)).sum(dim=-1)
    return per_crop_sum(rows, masked)


def per_crop_sum(rows: Tensor, masked: Tensor) -> Tensor:
    """Return the rows' values (M,) averaged over the `masked` (M,) ones of each crop, summed over the crops (0-d)."""
    return (rows / masked).sum()


def sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return distributions over prototypes that use all of them evenly (Sinkhorn-Knopp): (n, K) fp32.

    Starts from exp(logits) over all ranks' rows, and in turn scales every prototype to the same total and every row to
    1. In logarithms, which neither overflow nor underflow; the constants of the usual form (1 / K, 1 / rows) cancel, so
    the number of rows is not needed and may differ from rank to rank, down to none.

    Args:
        logits: (n, K) this rank's rows, divided by the temperature.
        iterations: rounds of both scalings.
    """
    log = logits.float()
    for _ in range(iterations):
        log = log - gather(log.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
        log = log.log_softmax(dim=-1)
    return log.exp()


@dataclass(frozen=True)
class TargetConfig:
    """How a teacher's logits become targets."""

    centring: Literal["softmax", "sinkhorn", "none"] = "softmax"
    """What keeps all targets from becoming one and the same. softmax: the logits' running mean is taken off them;
    sinkhorn: all prototypes are used evenly in every batch; none: nothing."""
    momentum: float = 0.9
    """Of the running mean."""
    temperature: tuple[float, float] = (0.04, 0.07)
    """At the start, and from the end of the warm-up on."""
    warmup: float = 30 / 800
    """Share of the run in which the temperature goes from one to the other on a line."""


class Targets(nn.Module):
    """Teacher's logits -> the distributions that the student is to predict; belongs in `Method.loss`.

    It remembers the mean of the logits over all ranks, which the centre follows once the step is taken.
    """

    centre: Tensor

    def __init__(self, config: TargetConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.temperature = config.temperature[0]
        self.register_buffer("centre", torch.empty(prototypes))
        self.entropies = torch.zeros(1)
        """(n,) of the last targets, in nats: what of the cross-entropy no student can take away."""
        self._mean: Tensor | None = None
        self._report: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        """Set the centre to 0."""
        nn.init.zeros_(self.centre)

    def start_step(self, at: Progress) -> None:
        """Set the temperature of the step."""
        self.temperature = at.ramp(*self.config.temperature, until=self.config.warmup)

    @torch.no_grad()
    def forward(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return distributions in the shape of `logits` (..., K), fp32, without a gradient.

        seen: (..., K) the logits whose mean the centre is to follow; None: the same.
        """
        logits = logits.float()
        if self.config.centring == "sinkhorn":
            targets = sinkhorn((logits / self.temperature).flatten(0, -2)).view_as(logits)
        else:
            targets = ((logits - self.centre) / self.temperature).softmax(dim=-1)
        if self.config.centring == "softmax":
            self._mean = self._global_mean((logits if seen is None else seen.float()).flatten(0, -2))
        self.entropies = torch.special.entr(targets).sum(dim=-1).flatten()
        self._report = {
            "target_entropy": self.entropies.mean(),
            "prototype_entropy": torch.special.entr(targets.flatten(0, -2).mean(dim=0)).sum(),
        }
        return targets

    def _global_mean(self, rows: Tensor) -> Tensor:
        """Return the mean (K,) of all ranks' rows (n, K); the centre itself where there are none."""
        total = sum_over_ranks(torch.cat([rows.sum(dim=0), rows.new_tensor([len(rows)])]))
        return torch.where(total[-1] > 0, total[:-1] / total[-1].clamp_min(1), self.centre)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the centre towards the mean that was seen last."""
        if self._mean is not None:
            self.centre.lerp_(self._mean, 1 - self.config.momentum)
            self._mean = None

    def report(self) -> dict[str, float]:
        """Return the temperature and what tells a collapse from the last targets of this rank, in nats.

        target_entropy: 0 if every target is a single prototype; prototype_entropy: that of the mean target, 0 if all
        have the same prototype. Both at ln K: the targets say nothing.
        """
        return {"teacher_temperature": self.temperature, **{name: float(v) for name, v in self._report.items()}}
