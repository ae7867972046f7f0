"""How a method is spread over processors: compile first, then DDP; and the precision it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from altsight.core.dist import world
from altsight.methods.base import Method
from altsight.train.accumulate import Embed


def parallelize(method: Method, compile_modules: bool) -> nn.Module:
    """Return the method's `embed` as a module, compiled and wrapped as asked; `method` stays the owner of the weights.

    Compilation is per tower and in place, so names in checkpoints do not change.
    """
    if compile_modules:
        method.encoder.compile()
        if method.text is not None:
            method.text.compile()
    model = Embed(method)
    if world().size == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in `dtype`: autocast for bf16, nothing for fp32.

    On a CPU bf16 attention is computed by plain matrix products: for the short sequences of small images torch's
    fused kernel, above all its backward, is 1.4 times slower (`bench/attention.py`).
    """
    half = dtype != torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        if half and device.type == "cpu":
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield
