"""MoCo v3: the loss against loops over the formula, the momentum encoder, the frozen patch projection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from altsight.core.rng import key
from altsight.core.types import Document, Progress
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.mocov3 import MoCoV3
from altsight.methods.two_views import BYOL_FIRST, BYOL_SECOND
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.optim import make_optimizer
from tests.methods.two_view_reference import Rows, slow_cosine, slow_head, stir, view_batch, without_gradient

CONFIG = MoCoV3.Config(hidden=12, out_dim=8)


@pytest.fixture
def method(encoder: Encoder) -> MoCoV3:
    method = MoCoV3(CONFIG, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    return method


def slow_contrast(queries: Rows, keys: Rows, temperature: float) -> float:
    """2 T times the mean cross-entropy of the own key among all keys."""
    total = 0.0
    for i, query in enumerate(queries):
        weights = [math.exp(slow_cosine(query, k) / temperature) for k in keys]
        total -= math.log(weights[i] / sum(weights))
    return 2 * temperature * total / len(queries)


def test_loss_equals_reference(method: MoCoV3) -> None:
    stir([p for part in (method.projector, method.predictor) for p in part.parameters()])
    stir(method.teacher.parameters(), seed=1)
    shared = method.embed(view_batch(), key(0, 0)).shared
    assert {n: tuple(x.shape) for n, x in shared.items()} == dict.fromkeys(
        ("first", "second", "first_key", "second_key"), (3, 32)
    )
    q, k = {}, {}
    for name in ("first", "second"):
        q[name] = slow_head(method.predictor, slow_head(method.projector, shared[name].tolist()))
        k[name] = slow_head(method.teacher["projector"], shared[f"{name}_key"].tolist())
    expected = slow_contrast(q["first"], k["second"], 0.2) + slow_contrast(q["second"], k["first"], 0.2)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-3)


def test_key_encoder_gets_no_gradient_and_everything_trained_does(method: MoCoV3) -> None:
    method.loss(method.embed(view_batch(), key(0, 0)).shared)["contrastive"].backward()
    frozen = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    slow = {name for name, _ in method.named_parameters() if name.startswith("teacher.")}
    assert without_gradient(method) == {f"encoder.backbone.{name}" for name in frozen} | slow
    assert slow and not any(p.requires_grad for p in method.teacher.parameters())


def test_patch_projection_is_the_same_after_training_and_the_rest_is_not(method: MoCoV3) -> None:
    method.train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = make_optimizer(method, dataclasses.replace(MoCoV3.optim, lr_base_batch=0, lr=1e-2), 4)
    for step in range(3):
        method.start_step(Progress(step, 3))
        Accumulator(method, Embed(method), seed=0)(view_batch())
        optimizer.step()
        method.after_step(Progress(step, 3))
        optimizer.zero_grad()
    same = {name for name, value in method.state_dict().items() if torch.equal(value, before[name])}
    encoders = ("encoder.backbone.", "teacher.encoder.backbone.")
    expected = {f"{e}{n}" for e in encoders for n in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")}
    assert same == expected


def test_patch_projection_can_be_trained(encoder: Encoder) -> None:
    method = MoCoV3(dataclasses.replace(CONFIG, freeze_patch_embed=False), encoder, Corpus())
    assert all(p.requires_grad for p in method.encoder.backbone.patch_embed.parameters())


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.99), (150, 0.995), (300, 1.0)])
def test_momentum_rises_on_a_cosine(method: MoCoV3, step: int, momentum: float) -> None:
    method.start_step(Progress(step, 300))
    assert method.report() == {"momentum": pytest.approx(momentum, abs=1e-9)}


def test_key_encoder_follows_before_the_keys_of_a_step(method: MoCoV3) -> None:
    before = [p.clone() for p in method.teacher.parameters()]
    stir([*method.encoder.parameters(), *method.projector.parameters()])
    students = [p.clone() for part in (method.encoder, method.projector) for p in part.parameters()]
    method.after_step(Progress(0, 300))
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.parameters(), before, strict=True))
    method.start_step(Progress(0, 300))
    for mine, old, student in zip(method.teacher.parameters(), before, students, strict=True):
        torch.testing.assert_close(mine, 0.99 * old + 0.01 * student)


def test_only_parameters_are_averaged() -> None:
    """A teacher's running statistics of batch norm are its own."""
    method = MoCoV3(CONFIG, Encoder(EncoderConfig("resnet18", img_size=32)), Corpus())
    method.init_weights(key(0, 0, "init"))
    with torch.no_grad():
        for buffer in method.encoder.buffers():
            buffer.add_(1)
    before = [b.clone() for b in method.teacher.buffers()]
    method.start_step(Progress(0, 300))
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.buffers(), before, strict=True))


def test_heads(encoder: Encoder) -> None:
    """ViT: projector of 4096, 4096, 256 and predictor of 4096, 256, both ending in batch norm without scale."""
    method = MoCoV3(MoCoV3.Config(), encoder, Corpus())
    for head, shapes in (
        (method.projector, [(4096, 32), (4096, 4096), (256, 4096)]),
        (method.predictor, [(4096, 256), (256, 4096)]),
    ):
        maps = [m for m in head.layers if isinstance(m, nn.Linear)]
        assert [tuple(m.weight.shape) for m in maps] == shapes and all(m.bias is None for m in maps)
        assert type(head.layers[-1]).__name__ == "GlobalBatchNorm" and not list(head.layers[-1].parameters())


def test_heads_of_a_resnet() -> None:
    """Projector of two maps, predictor without batch norm at the end; keys are computed in training mode."""
    method = MoCoV3(CONFIG, Encoder(EncoderConfig("resnet18", img_size=32)), Corpus()).train()
    maps = [tuple(m.weight.shape) for m in method.projector.layers if isinstance(m, nn.Linear)]
    assert maps == [(12, 512), (8, 12)] and not list(method.projector.layers[-1].parameters())
    last = method.predictor.layers[-1]
    assert isinstance(last, nn.Linear) and last.bias is None
    assert method.teacher["encoder"].training and all(p.requires_grad for p in method.encoder.parameters())


def test_optimizer_is_the_sources(method: MoCoV3) -> None:
    """AdamW (.9, .999), 1.5e-4 * 4096 / 256, decay .1 on *all* parameters, warm-up 40 of 300 epochs."""
    optimizer = make_optimizer(method, MoCoV3.optim, 4096)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.1 and group["lr"] == pytest.approx(2.4e-3) and group["betas"] == (0.9, 0.999)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}
    assert MoCoV3.optim.warmup_fraction == pytest.approx(40 / 300)


def test_prepare_draws_views_of_the_methods_own(method: MoCoV3, document: Callable[..., Document]) -> None:
    prepare = method.prepare(Crop(scale=(0.9, 1.0)), 32)
    assert (prepare.first, prepare.second) == (BYOL_FIRST, BYOL_SECOND)
    assert prepare(document(text=None), key(0, 5)) is not None
    assert MoCoV3.least_batch == 2 and MoCoV3.drops_patches


@pytest.mark.parametrize(("model", "millions"), [("vit_small_patch16_224", 22), ("vit_base_patch16_224", 86)])
def test_published_sizes(model: str, millions: int) -> None:
    """Specification 0.2: S and B have 22 M and 86 M parameters, both with 12 heads."""
    with torch.device("meta"):
        method = MoCoV3(MoCoV3.Config(), Encoder(EncoderConfig(model, heads=12, init="moco")), Corpus())
    assert round(sum(p.numel() for p in method.encoder.parameters()) / 1e6) == millions
    assert method.encoder.width // 12 == method.encoder.backbone.blocks[0].attn.head_dim
