"""SimCLR: the loss against loops over the formula, its head, its views, its optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from altsight.core.rng import key
from altsight.core.types import Document
from altsight.data.photometric import Photometric
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.simclr import SimCLR
from altsight.nn.encoder import Encoder
from altsight.train.optim import make_optimizer
from tests.methods.two_view_reference import Rows, slow_cosine, slow_head, stir, view_batch, without_gradient

CONFIG = SimCLR.Config(out_dim=8)


def make(encoder: Encoder, config: SimCLR.Config = CONFIG) -> SimCLR:
    method = SimCLR(config, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    stir(method.projector.parameters())
    return method


def slow_loss(first: Rows, second: Rows, temperature: float) -> float:
    """Cross-entropy of each view against all 2N - 1 others; mean over images, *sum* of the two directions."""
    views, n, total = [*first, *second], len(first), 0.0
    for i, view in enumerate(views):
        others = {j: math.exp(slow_cosine(view, v) / temperature) for j, v in enumerate(views) if j != i}
        total -= math.log(others[(i + n) % (2 * n)] / sum(others.values()))
    return total / n


@pytest.mark.parametrize("layers", [2, 3])
def test_loss_equals_reference(encoder: Encoder, layers: int) -> None:
    method = make(encoder, dataclasses.replace(CONFIG, layers=layers))
    shared = method.embed(view_batch(), key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"first": (3, 32), "second": (3, 32)}
    # Batch norm in the head sees both views at once.
    projected = slow_head(method.projector, [*shared["first"].tolist(), *shared["second"].tolist()])
    expected = slow_loss(projected[:3], projected[3:], 0.1)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-3)


def test_head(encoder: Encoder) -> None:
    """Hidden maps are as wide as the features; batch norm follows every map, the last included."""
    for layers in (2, 3):
        maps = [m for m in make(encoder, SimCLR.Config(layers=layers)).projector.layers if isinstance(m, nn.Linear)]
        assert [m.weight.shape for m in maps] == [(32, 32)] * (layers - 1) + [(128, 32)]
        assert all(m.bias is None for m in maps)
    assert len(make(encoder).projector.layers) == 3 * 2 + 2


def test_every_trained_parameter_gets_a_gradient(encoder: Encoder) -> None:
    method = make(encoder)
    method.loss(method.embed(view_batch(), key(0, 0)).shared)["contrastive"].backward()
    assert without_gradient(method) == {"encoder.backbone.pos_embed"}


def test_prepare_draws_views_of_the_methods_own(encoder: Encoder, document: Callable[..., Document]) -> None:
    prepare = make(encoder).prepare(Crop(scale=(0.9, 1.0)), 32)
    assert prepare.first == prepare.second == CONFIG.views
    assert CONFIG.views.crop == Crop(scale=(0.08, 1.0))
    assert CONFIG.views.colour == Photometric(0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5, (0.1, 2.0), 0.0)
    example = prepare(document(text=None), key(0, 5))
    assert example is not None and example["image"].shape == (2, 3, 32, 32)


def test_optimizer_is_the_sources(encoder: Encoder) -> None:
    """LARS, .3 * 4096 / 256, momentum .9, decay 1e-4 but on biases and norms, warm-up 10 of 100 epochs."""
    method = make(encoder)
    optimizer = make_optimizer(method, SimCLR.optim, 4096)
    assert type(optimizer).__name__ == "Lars" and SimCLR.optim.warmup_fraction == 0.1
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (1e-4 if parameter.ndim > 1 else 0), name
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(4.8) and group["momentum"] == 0.9 and group["trust_coeff"] == 1e-3
        assert not group["always_adapt"]


def test_one_sample_has_no_others() -> None:
    assert SimCLR.least_batch == 2 and SimCLR.shares


def test_patch_dropout_is_heeded(encoder: Encoder) -> None:
    assert SimCLR.drops_patches
    method, keep = make(encoder), torch.tensor([[0, 1], [2, 3], [4, 5]])
    whole = method.embed(view_batch(), key(0, 0)).shared["first"]
    assert not torch.allclose(method.embed(view_batch(visible=keep), key(0, 0)).shared["first"], whole, atol=1e-3)
