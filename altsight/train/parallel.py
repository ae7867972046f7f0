"""How a method is spread over processors: compile first, then DDP."""

from __future__ import annotations

import torch
from torch import nn
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


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context for `dtype`; switched off for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32)
