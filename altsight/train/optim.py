"""timm's optimizers and schedule, with each method's own decay exclusions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError, did_you_mean
from altsight.methods.base import Method


def make_optimizer(method: Method, config: OptimConfig, batch: int) -> torch.optim.Optimizer:
    """Return the optimizer; tensors with fewer than two dimensions and those the method names do not decay.

    Raises:
        UserError: timm has no optimizer of that name.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise UserError(f"timm has no optimizer '{config.name}'.{did_you_mean(config.name, known)}")
    excluded = method.no_weight_decay()
    groups = param_groups_weight_decay(method, config.weight_decay, no_weight_decay_list=excluded)
    accepted = inspect.signature(get_optimizer_class(config.name, bind_defaults=False)).parameters
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "momentum": config.betas[0]}
    options = {name: value for name, value in options.items() if name in accepted}
    usual = accepted["betas"].default if "betas" in options else None
    if usual is not None and len(usual) != len(config.betas):
        del options["betas"]  # Adan and its like take three, and keep their own
    return create_optimizer_v2(groups, opt=config.name, lr=config.peak_lr(batch), **options)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> CosineLRScheduler:
    """Return linear warm-up from 0, then cosine to `min_lr`, stepped per iteration by `step_update`."""
    warmup = round(config.warmup_fraction * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps, 1),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        t_in_epochs=False,
    )
