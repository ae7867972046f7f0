"""SimSiam: the loss against loops over the formula, the stopped gradient, the predictor's constant rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from altsight.core.rng import key
from altsight.core.types import Document
from altsight.data.photometric import Photometric
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.simsiam import SimSiam
from altsight.nn.encoder import Encoder
from altsight.train.optim import make_optimizer
from altsight.train.schedule import Schedule
from tests.methods.two_view_reference import slow_cosine, slow_head, stir, view_batch, without_gradient

CONFIG = SimSiam.Config(hidden=12, out_dim=8, bottleneck=4)


@pytest.fixture
def method(encoder: Encoder) -> SimSiam:
    method = SimSiam(CONFIG, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    stir([*method.projector.parameters(), *method.predictor.parameters()])
    return method


def test_loss_equals_the_slow_reference(method: SimSiam) -> None:
    """-1/2 [cos(p1, z2) + cos(p2, z1)], each view through the heads by itself."""
    shared = method.embed(view_batch(), key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"first": (3, 32), "second": (3, 32)}
    z = {name: slow_head(method.projector, rows.tolist()) for name, rows in shared.items()}
    p = {name: slow_head(method.predictor, rows) for name, rows in z.items()}
    forth = sum(slow_cosine(u, v) for u, v in zip(p["first"], z["second"], strict=True)) / 3
    back = sum(slow_cosine(u, v) for u, v in zip(p["second"], z["first"], strict=True)) / 3
    assert method.loss(shared)["similarity"].item() == pytest.approx(-(forth + back) / 2, rel=1e-3, abs=1e-4)


def test_gradient_stops_at_the_targets(method: SimSiam) -> None:
    """With a predictor that ignores its input nothing reaches the projector: its outputs as targets are constants."""
    last: Any = method.predictor.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
    shared = {name: x.detach() for name, x in method.embed(view_batch(), key(0, 0)).shared.items()}
    method.loss(shared)["similarity"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.projector.parameters())
    assert last.bias.grad.abs().max() > 0


def test_heads(encoder: Encoder) -> None:
    """Projector of three maps of 2048, the last norm without scale; predictor with a bottleneck of 512."""
    method = SimSiam(SimSiam.Config(), encoder, Corpus())
    shapes = [tuple(m.weight.shape) for m in method.projector.layers if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 32), (2048, 2048), (2048, 2048)]
    assert not list(method.projector.layers[-1].parameters())
    layers: Any = method.predictor.layers
    first, norm, _, last = layers
    assert (tuple(first.weight.shape), tuple(last.weight.shape)) == ((512, 2048), (2048, 512))
    assert first.bias is None and last.bias is not None and norm.weight is not None


def test_every_trained_parameter_gets_a_gradient(method: SimSiam) -> None:
    method.loss(method.embed(view_batch(), key(0, 0)).shared)["similarity"].backward()
    assert without_gradient(method) == {"encoder.backbone.pos_embed"}


def test_optimizer_is_the_sources_and_the_predictors_rate_stays(method: SimSiam) -> None:
    """SGD without Nesterov, .05 * 512 / 256, momentum .9, decay 1e-4 on everything, no warm-up, cosine."""
    optimizer = make_optimizer(method, SimSiam.optim, 512)
    assert type(optimizer) is torch.optim.SGD
    schedule = Schedule(optimizer, SimSiam.optim, 100, 512)
    names = {id(p): name for name, p in method.named_parameters()}
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    rates = {}
    for step in (0, 50, 100):
        schedule.update(step)
        rates[step] = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert rates[step].keys() == trained
    for name in trained:
        expected = (0.1, 0.1, 0.1) if name.startswith("predictor.") else (0.1, 0.05, 0.0)
        assert [rates[step][name] for step in (0, 50, 100)] == pytest.approx(expected), name
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)


def test_prepare_draws_views_of_the_methods_own(method: SimSiam, document: Callable[..., Document]) -> None:
    prepare = method.prepare(Crop(scale=(0.9, 1.0)), 32)
    assert prepare.first == prepare.second == CONFIG.views
    assert CONFIG.views.crop == Crop(scale=(0.2, 1.0))
    assert CONFIG.views.colour == Photometric(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0), 0.0)
    assert prepare(document(text=None), key(0, 5)) is not None
    assert SimSiam.least_batch == 2 and SimSiam.drops_patches


def test_defaults_are_the_papers() -> None:
    expected = {"hidden": 2048, "out_dim": 2048, "bottleneck": 512}
    config = {f.name: getattr(SimSiam.Config(), f.name) for f in dataclasses.fields(SimSiam.Config)}
    assert {name: config[name] for name in expected} == expected
