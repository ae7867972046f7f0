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
from altsight.train.optim import make_optimizer, parameter_groups
from altsight.train.run import build
from altsight.train.schedule import Schedule
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


def rates(config: OptimConfig, name: str = "lr", steps: int = 100) -> list[float]:
    """Return what `name` of the first group is at every step."""
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 1.0, "constant_lr": False, "decays": True}
    optimizer = torch.optim.SGD([group], lr=config.peak_lr(256))
    schedule = Schedule(optimizer, config, steps, 256)
    found = []
    for step in range(steps):
        schedule.update(step)
        found.append(float(optimizer.param_groups[0][name]))
    return found


ONE = OptimConfig(lr=1.0, warmup_fraction=0.1)


def test_schedule_is_linear_then_cosine() -> None:
    found = rates(ONE)
    assert found[:10] == pytest.approx([n / 10 for n in range(10)])
    assert found[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 55 / 100)), abs=0.05)
    assert found[-1] < 0.01 and all(a >= b for a, b in pairwise(found[10:]))


def test_the_other_schedules() -> None:
    linear = rates(dataclasses.replace(ONE, schedule="linear"))
    assert linear[10:] == pytest.approx([1 - n / 100 for n in range(10, 100)])
    poly = rates(dataclasses.replace(ONE, schedule="linear", power=0.9))
    assert poly[10:] == pytest.approx([(1 - n / 100) ** 0.9 for n in range(10, 100)])
    step = rates(dataclasses.replace(ONE, schedule="step", step_at=0.5))
    assert step[10:48] == [1.0] * 38 and step[52:] == pytest.approx([0.1] * 48)
    assert rates(dataclasses.replace(ONE, schedule="constant"))[10:] == [1.0] * 90
    assert rates(dataclasses.replace(ONE, warmup_lr=0.5))[0] == 0.5


def test_weight_decay_rises_on_a_half_cosine() -> None:
    found = rates(dataclasses.replace(ONE, weight_decay=0.04, final_weight_decay=0.4), "weight_decay")
    assert found[0] == pytest.approx(0.04) and found[50] == pytest.approx(0.22)
    assert found[-1] == pytest.approx(0.4, abs=1e-3)


def test_layers_parts_and_constant_rates() -> None:
    """Specification E3.11: the patch embedding's rate is decay^(depth + 1) of the peak, the head's is the peak."""
    method = build(tiny_run("mae", Path(), 64), Corpus())
    method.lr_scales = lambda: {"encoder.backbone.patch_embed": 0.2}  # type: ignore[method-assign]
    method.constant_lr = lambda: ("pixels.decoder.pixels",)  # type: ignore[method-assign]
    config = OptimConfig(lr=1.0, lr_base_batch=0, layer_decay=0.5, warmup_fraction=0.1)
    optimizer = make_optimizer(method, config, 64)
    Schedule(optimizer, config, 100, 64).update(5)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: rate[id(p)] for name, p in method.named_parameters() if p.requires_grad}
    assert found["encoder.backbone.patch_embed.proj.weight"] == pytest.approx(0.5 * 0.5**3 * 0.2)
    assert found["encoder.backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(0.5 * 0.5**2)
    assert found["encoder.backbone.blocks.1.mlp.fc1.weight"] == pytest.approx(0.5 * 0.5)
    assert found["encoder.backbone.norm.weight"] == pytest.approx(0.5)
    assert found["pixels.decoder.embed.weight"] == pytest.approx(0.5)
    assert found["pixels.decoder.pixels.weight"] == pytest.approx(1.0)


def test_everything_decays_where_the_source_says_so() -> None:
    method = build(tiny_run("mae", Path(), 64), Corpus())
    groups = parameter_groups(method, OptimConfig(weight_decay=0.1, decay_all=True))
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert {g["weight_decay"] for g in parameter_groups(method, OptimConfig(weight_decay=0.1))} == {0.0, 0.1}


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_lookahead_walks_half_way_every_k_steps(name: str) -> None:
    """Every second step the slow weights, which start where the run does, go half of the way, and the fast follow."""
    config = OptimConfig(name=name, lr=0.1, lr_base_batch=0, lookahead=2, weight_decay=0.0, betas=(0.0, 0.0))
    method = build(tiny_run("mae", Path(), 64), Corpus())
    optimizer = make_optimizer(method, config, 64)
    token = method.encoder.backbone.cls_token
    start, values = float(token.detach().flatten()[0]), []
    for _ in range(4):
        for p in method.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        values.append(float(token.detach().flatten()[0]) - start)
    # A step is 0.1 down, with either optimizer: two steps, and half of the way back.
    assert values == pytest.approx([-0.1, -0.1, -0.2, -0.2], abs=1e-5)
