"""timm's optimizers, with each method's own decay exclusions and learning rates of its parts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import Lookahead, create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError, did_you_mean
from altsight.methods.base import Method


def make_optimizer(method: Method, config: OptimConfig, batch: int) -> torch.optim.Optimizer:
    """Return the optimizer over `parameter_groups`.

    Raises:
        UserError: timm has no optimizer of that name.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise UserError(f"timm has no optimizer '{config.name}'.{did_you_mean(config.name, known)}")
    accepted = inspect.signature(get_optimizer_class(config.name, bind_defaults=False)).parameters
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "momentum": config.betas[0]}
    options = {name: value for name, value in options.items() if name in accepted}
    usual = accepted["betas"].default if "betas" in options else None
    if usual is not None and len(usual) != len(config.betas):
        del options["betas"]  # Adan and its like take three, and keep their own
    groups = parameter_groups(method, config)
    optimizer = create_optimizer_v2(groups, opt=config.name, lr=config.peak_lr(batch), **options)
    if not config.lookahead:
        return optimizer
    _keep_start(optimizer)
    wrapped: torch.optim.Optimizer = Lookahead(optimizer, k=config.lookahead)  # type: ignore[no-untyped-call]
    return wrapped


def _keep_start(optimizer: torch.optim.Optimizer) -> None:
    """Let Lookahead's slow weights start at the weights before the first step (Zhang et al. 2019).

    timm's start at those of its first synchronisation, which then does nothing. They are put into the optimizer's state
    after its first step, since many optimizers take a state that holds anything for one that they have set up.
    """
    start = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    def keep(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, weights in start.items():
            if parameter.grad is not None:
                stepped.state[parameter].setdefault("lookahead_slow_buff", weights)
        handle.remove()

    handle = optimizer.register_step_post_hook(keep)


def parameter_groups(method: Method, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the trained parameters by weight decay, factor on the learning rate, and whether the latter is constant.

    Those that the method names do not decay, nor do tensors with fewer than two dimensions unless `decay_all` is set.
    """
    exempt, scales, constant = method.no_weight_decay(), method.lr_scales(), method.constant_lr()
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = (config.decay_all or parameter.ndim > 1) and name not in exempt
        scale = _layer_scale(method, config.layer_decay, name)
        for prefix, factor in scales.items():
            scale *= factor if name.startswith(prefix) else 1.0
        groups.setdefault((decays, scale, name.startswith(constant)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
            "lr_scale": scale,
            "constant_lr": constant,
        }
        for (decays, scale, constant), parameters in groups.items()
    ]


def _layer_scale(method: Method, decay: float, name: str) -> float:
    if decay == 1.0 or not name.startswith("encoder."):
        return 1.0
    layer = method.encoder.layer_of(name.removeprefix("encoder."))
    return float(decay ** (len(method.encoder.backbone.blocks) + 1 - layer))
