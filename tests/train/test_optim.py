"""Optimizers, decay groups and the schedule."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.methods.base import Corpus
from altsight.train.optim import make_optimizer, make_schedule
from altsight.train.run import build
from tests.contract.tiny import tiny_run


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "lars", "adafactor", "adan"])
def test_any_timm_optimizer_takes_a_step(name: str) -> None:
    method = build(tiny_run("mae", Path(), 64), Corpus())
    optimizer = make_optimizer(method, OptimConfig(name=name, lr=0.1, lr_base_batch=0), 64)
    before = method.encoder.backbone.cls_token.clone()
    for p in method.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert not torch.equal(before, method.encoder.backbone.cls_token)


def test_betas_and_eps_reach_the_optimizer() -> None:
    method = build(tiny_run("mae", Path(), 64), Corpus())
    config = OptimConfig(betas=(0.7, 0.8), eps=1e-5, lr=1e-3, lr_base_batch=256)
    group = make_optimizer(method, config, 512).param_groups[0]
    assert group["betas"] == (0.7, 0.8) and group["eps"] == 1e-5 and group["lr"] == pytest.approx(2e-3)


def test_unknown_optimizer() -> None:
    method = build(tiny_run("mae", Path(), 64), Corpus())
    with pytest.raises(UserError, match="Did you mean 'adamw'"):
        make_optimizer(method, OptimConfig(name="adamwz"), 64)


def test_schedule_is_linear_then_cosine() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = dataclasses.replace(OptimConfig(), warmup_fraction=0.1, min_lr=0.0)
    schedule = make_schedule(optimizer, config, steps=100)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([n / 10 for n in range(10)])
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 55 / 100)), abs=0.05)
    assert rates[-1] < 0.01 and all(a >= b for a, b in pairwise(rates[10:]))
