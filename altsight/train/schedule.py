"""What changes from step to step: learning rates and weight decay."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler

from altsight.core.config import OptimConfig
from altsight.core.types import Progress


class Schedule:
    """Linear warm-up, then timm's schedule; parts with a constant rate stay at their peak; decay on a half cosine."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int, batch: int) -> None:
        self.optimizer, self.config, self.steps, self.peak = optimizer, config, steps, config.peak_lr(batch)
        self._rates = _rates(optimizer, config, max(steps, 1))

    def update(self, step: float) -> None:
        """Set what holds for `step`, the number of steps done; a curriculum may count them by what they cost."""
        # timm says int, but its formulas hold for all that lies between.
        self._rates.step_update(step)  # type: ignore[arg-type]
        decay = self.config.weight_decay
        if self.config.final_weight_decay is not None:
            decay = Progress(round(step), self.steps).cosine(decay, self.config.final_weight_decay)
        for group in self.optimizer.param_groups:
            if group["constant_lr"]:
                group["lr"] = self.peak * group["lr_scale"]
            if group["decays"]:
                group["weight_decay"] = decay


def _rates(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Scheduler:
    warmup: dict[str, Any] = {
        "warmup_t": round(config.warmup_fraction * steps),
        "warmup_lr_init": config.warmup_lr,
        "t_in_epochs": False,
    }
    if config.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=steps, lr_min=config.min_lr, **warmup)
    if config.schedule == "linear":
        return PolyLRScheduler(optimizer, t_initial=steps, power=config.power, lr_min=config.min_lr, **warmup)
    milestones = [round(config.step_at * steps)] if config.schedule == "step" else []
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, warmup_prefix=False, **warmup)
