"""The process group: world, global sums, and the one gather with a gradient.

Every function is the identity in a single process, so callers never ask whether a group exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Run the body as if there were no other ranks: nothing is communicated."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world() -> World:
    """Return the place of this process; (0, 1, 0) where no group was started."""
    if _alone or not (td.is_available() and td.is_initialized()):
        return World()
    return World(td.get_rank(), td.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def start(device: torch.device) -> World:
    """Join the group that `torchrun` describes in the environment (NCCL on CUDA, gloo otherwise)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        td.init_process_group(backend, timeout=timedelta(minutes=10))
    return world()


def stop() -> None:
    """Leave the group, where one was started."""
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if world().size > 1:
        td.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of `x` over all ranks (no gradient)."""
    if world().size > 1:
        x = x.detach().clone()
        td.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    if world().size == 1:
        return flag
    device = torch.device("cuda", world().local_rank) if td.get_backend() == "nccl" else torch.device("cpu")
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order (picklable objects; for reports, not for tensors)."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    td.all_gather_object(values, value)
    return values


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a slice is the sum of what every rank's loss says about it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Gather the rows of all ranks."""
        out = x.new_empty((world().size * x.shape[0], *x.shape[1:]))
        td.all_gather_into_tensor(out, x.contiguous())
        ctx.rows = x.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Add up what all ranks say about this rank's rows."""
        grad = grads[0].contiguous()
        td.all_reduce(grad)
        start = world().rank * ctx.rows
        return grad[start : start + ctx.rows]


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate `x` (n, ...) over ranks whose n differ, with the exact gradient.

    Returns:
        (the rows of all ranks in rank order, the place of this rank's first row among them).
    """
    if world().size == 1:
        return x, 0
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros((max(counts) - len(x), *x.shape[1:]))])
    parts = gather(padded).split(max(counts)) if max(counts) else [x] * len(counts)
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows, sum(counts[: world().rank])


def gather(x: Tensor) -> Tensor:
    """Concatenate `x` (n, ...) over ranks to (world * n, ...), with the exact gradient.

    Every rank must hold the same number of rows. If each rank's loss is its share of the global loss, the gradient
    that reaches `x` is that of the global loss.
    """
    if world().size == 1:
        return x
    return _Gather.apply(x)
