"""What a run costs: training FLOPs per sample, counted by the operators themselves."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from altsight.core.dist import alone
from altsight.core.rng import key, torch_seeded
from altsight.core.types import Batch
from altsight.methods.base import Method


def flops_per_sample(method: Method, batch: Batch) -> float:
    """Return floating-point operations of forward and backward for one sample (a multiply-add counts as two).

    Counted on a copy of the method over (up to) four samples of `batch`: matrix products, convolutions and attention.
    The heads of a loss count, taken over these few. Element-wise work, the optimizer and the part of a shared loss that
    grows with the square of the batch are left out; so is the second forward of cached gradients, since the result
    does not depend on it.
    """
    probe = copy.deepcopy(method)
    few = batch.part(0, min(4, len(batch)))
    at = key(0, 0, "account")
    with FlopCounterMode(display=False) as counter, torch_seeded(at), alone():
        out = probe.embed(few, at)
        losses = [*out.local.values(), *(probe.loss(out.shared).values() if out.shared else ())]
        torch.stack(losses).sum().backward()
    return counter.get_total_flops() / len(few)
