"""BYOL: the loss against loops over the formula, the target network, the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from altsight.core.rng import key
from altsight.core.types import Document, Progress
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.byol import BYOL
from altsight.methods.two_views import BYOL_FIRST, BYOL_SECOND
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.optim import make_optimizer
from tests.methods.two_view_reference import slow_cosine, slow_head, stir, view_batch, without_gradient

CONFIG = BYOL.Config(hidden=12, out_dim=8)


@pytest.fixture
def method(encoder: Encoder) -> BYOL:
    method = BYOL(CONFIG, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    return method


def test_loss_equals_the_slow_reference(method: BYOL) -> None:
    """2 - 2 cos(q1, t2) + 2 - 2 cos(q2, t1); the target has weights of its own."""
    stir([p for part in (method.projector, method.predictor) for p in part.parameters()])
    stir(method.teacher.parameters(), seed=1)
    shared = method.embed(view_batch(), key(0, 0)).shared
    assert {n: tuple(x.shape) for n, x in shared.items()} == dict.fromkeys(
        ("first", "second", "first_target", "second_target"), (3, 32)
    )
    q, t = {}, {}
    for name in ("first", "second"):
        q[name] = slow_head(method.predictor, slow_head(method.projector, shared[name].tolist()))
        t[name] = slow_head(method.teacher["projector"], shared[f"{name}_target"].tolist())
    expected = 0.0
    for mine, other in (("first", "second"), ("second", "first")):
        expected += sum(2 - 2 * slow_cosine(u, v) for u, v in zip(q[mine], t[other], strict=True)) / 3
    assert method.loss(shared)["distance"].item() == pytest.approx(expected, rel=1e-3)


def test_target_starts_as_a_copy_and_sees_the_same_views(method: BYOL) -> None:
    shared = method.embed(view_batch(), key(0, 0)).shared
    for name in ("first", "second"):
        assert torch.equal(shared[name], shared[f"{name}_target"])
        assert not shared[f"{name}_target"].requires_grad


def test_target_gets_no_gradient_and_everything_trained_does(method: BYOL) -> None:
    method.loss(method.embed(view_batch(), key(0, 0)).shared)["distance"].backward()
    target = {name for name, _ in method.named_parameters() if name.startswith("teacher.")}
    assert without_gradient(method) == {"encoder.backbone.pos_embed"} | target
    optimizer = make_optimizer(method, BYOL.optim, 256)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in method.teacher.parameters()}


def test_target_follows_encoder_and_projector_after_the_step(method: BYOL) -> None:
    before = [p.clone() for p in method.teacher.parameters()]
    stir([*method.encoder.parameters(), *method.projector.parameters()])
    students = [p.clone() for part in (method.encoder, method.projector) for p in part.parameters()]
    method.start_step(Progress(0, 1000))
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.parameters(), before, strict=True))
    method.after_step(Progress(0, 1000))
    for mine, old, student in zip(method.teacher.parameters(), before, students, strict=True):
        torch.testing.assert_close(mine, 0.996 * old + 0.004 * student)


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.996), (500, 0.998), (1000, 1.0)])
def test_momentum_rises_on_a_cosine(method: BYOL, step: int, momentum: float) -> None:
    method.after_step(Progress(step, 1000))
    assert method.report() == {"momentum": pytest.approx(momentum, abs=1e-9)}


def test_heads(encoder: Encoder) -> None:
    """Both of 4096 hidden values with batch norm and 256 without, and no bias on the last map."""
    method = BYOL(BYOL.Config(), encoder, Corpus())
    heads: Any = ((method.projector, 32), (method.predictor, 256))
    for head, width in heads:
        first, norm, _, last = head.layers
        assert (tuple(first.weight.shape), tuple(last.weight.shape)) == ((4096, width), (256, 4096))
        assert norm.weight is not None and last.bias is None


@pytest.mark.parametrize(("model", "training"), [("vit_tiny_patch16_224", False), ("resnet18", True)])
def test_target_uses_the_statistics_of_the_batch(model: str, training: bool) -> None:
    """A target with batch norm computes as in training; another one as in evaluation, without drop path."""
    method = BYOL(CONFIG, Encoder(EncoderConfig(model, img_size=32)), Corpus()).train()
    assert method.teacher["encoder"].training is training
    assert not method.eval().teacher["encoder"].training


def test_target_has_no_drop_path(corpus: Corpus) -> None:
    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2, drop_path=0.5)
    method = BYOL(CONFIG, Encoder(config), corpus).train()
    method.init_weights(key(0, 0, "init"))
    torch.manual_seed(0)
    trained, whole = method.embed(view_batch(), key(0, 0)).shared, method.eval().embed(view_batch(), key(0, 0)).shared
    assert torch.equal(trained["first_target"], whole["first_target"])
    assert not torch.equal(trained["first"], whole["first"])


def test_optimizer_is_the_sources(method: BYOL) -> None:
    """LARS, .2 * 4096 / 256, momentum .9, eta 1e-3, decay 1.5e-6 but on biases and norms, 10 of 1,000 epochs."""
    optimizer = make_optimizer(method, BYOL.optim, 4096)
    assert type(optimizer).__name__ == "Lars" and BYOL.optim.warmup_fraction == 0.01
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(3.2) and group["momentum"] == 0.9 and group["trust_coeff"] == 1e-3
        assert all((p.ndim > 1) == (group["weight_decay"] == 1.5e-6) for p in group["params"])


def test_prepare_draws_views_of_the_methods_own(method: BYOL, document: Callable[..., Document]) -> None:
    prepare = method.prepare(Crop(scale=(0.9, 1.0)), 32)
    assert (prepare.first, prepare.second) == (BYOL_FIRST, BYOL_SECOND)
    assert prepare(document(text=None), key(0, 5)) is not None
    assert BYOL.least_batch == 2 and BYOL.drops_patches


def test_what_is_evaluated_is_the_online_encoder(method: BYOL) -> None:
    assert method.evaluated is method.encoder
    assert isinstance(method.teacher["encoder"], nn.Module) and method.teacher["encoder"] is not method.encoder
