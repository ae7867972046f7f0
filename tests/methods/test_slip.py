"""SLIP: both losses against loops over their formulas, the three passes, the preparation, decay and scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.photometric import Photometric
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.clip import CLIP
from altsight.methods.slip import SLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig
from altsight.train.optim import make_optimizer
from tests.methods.two_view_reference import Rows, slow_cosine, slow_head, stir, view_batch, without_gradient

TEXT = TextConfig(width=32, heads=2, layers=1, context=16)
CONFIG = SLIP.Config(text=TEXT, embed_dim=24, hidden=12, out_dim=8)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> SLIP:
    method = SLIP(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def triple(batch: Batch) -> Batch:
    """Image and text of the common batch, and two views of each sample."""
    views = view_batch()
    tensors = {"image": batch["image"], "text": batch["text"], "views": views["image"], "colour": views["colour"]}
    return Batch(tensors, batch.positions, batch.samples)


def slow_clip(image: Rows, text: Rows, scale: float) -> float:
    """Mean of both cross-entropies over all pairs."""
    total = 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = [scale * slow_cosine(u, v) for v in other]
            total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return total / (2 * len(image))


def slow_simclr(first: Rows, second: Rows, temperature: float) -> float:
    """Mean over all 2N views of the cross-entropy against the 2N - 1 others: the average of the two directions."""
    views, n, total = [*first, *second], len(first), 0.0
    for i, view in enumerate(views):
        others = {j: math.exp(slow_cosine(view, v) / temperature) for j, v in enumerate(views) if j != i}
        total -= math.log(others[(i + n) % (2 * n)] / sum(others.values()))
    return total / (2 * n)


def test_losses_equal_reference(method: SLIP, triple: Batch) -> None:
    stir(method.projector.parameters())
    shared = method.embed(triple, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {
        "image": (3, 24),
        "text": (3, 24),
        "first": (3, 32),
        "second": (3, 32),
    }
    losses = method.loss(shared)
    first, second = (slow_head(method.projector, shared[name].tolist()) for name in ("first", "second"))
    assert losses["views"].item() == pytest.approx(slow_simclr(first, second, 0.1), rel=1e-3)
    expected = slow_clip(shared["image"].tolist(), shared["text"].tolist(), 1 / 0.07)
    assert losses["contrastive"].item() == pytest.approx(expected, rel=1e-5)
    assert method.weights() == {"views": 1.0}


def test_three_passes_of_the_encoder(method: SLIP, triple: Batch) -> None:
    seen: list[tuple[int, ...]] = []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    method.embed(triple, key(0, 0))
    assert seen == [(3, 3, 32, 32)] * 3


def test_text_sees_the_image_and_not_the_views(method: SLIP, triple: Batch) -> None:
    before = method.embed(triple, key(0, 0)).shared
    triple.tensors["views"] = 255 - triple["views"]
    after = method.embed(triple, key(0, 0)).shared
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"first", "second"}


def test_every_trained_parameter_gets_a_gradient(method: SLIP, triple: Batch) -> None:
    losses = method.loss(method.embed(triple, key(0, 0)).shared)
    torch.stack(list(losses.values())).sum().backward()
    assert without_gradient(method) == {"encoder.backbone.pos_embed"}


def test_starts_as_clip_does(method: SLIP, encoder: Encoder, corpus: Corpus) -> None:
    """At the same key both have the same towers and projections: what differs is the loss on the views."""
    clip = CLIP(CLIP.Config(text=TEXT, embed_dim=24), encoder, corpus)
    clip.init_weights(key(0, 0, "init"))
    mine = method.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in clip.state_dict().items())
    assert {name.split(".")[0] for name in mine.keys() - clip.state_dict().keys()} == {"projector"}


def test_prepare(method: SLIP, corpus: Corpus, document: Callable[..., Document]) -> None:
    crop, at = Crop(scale=(0.5, 1.0)), key(0, 5)
    prepare = method.prepare(crop, 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], crop(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    alone = prepare.views(document(), at)
    assert alone is not None
    assert torch.equal(example["views"], alone["image"]) and torch.equal(example["colour"], alone["colour"])
    assert prepare(document(text=None), at) is None
    assert CONFIG.views.crop == Crop(scale=(0.08, 1.0))
    assert CONFIG.views.colour == Photometric(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0), 0.0)


def test_head(encoder: Encoder, corpus: Corpus) -> None:
    """4096, 4096, 256; batch norm and ReLU on the hidden values, the last map plain."""
    layers = SLIP(SLIP.Config(text=TEXT), encoder, corpus).projector.layers
    maps = [m for m in layers if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in maps] == [(4096, 32), (4096, 4096), (256, 4096)]
    assert [m.bias is not None for m in maps] == [False, False, True] and layers[-1] is maps[-1]
    assert len(layers) == 7


@pytest.mark.parametrize("relative", [False, True])
def test_decay_and_optimizer_are_the_sources(corpus: Corpus, relative: bool) -> None:
    """AdamW (.9, .98), eps 1e-8, 3e-3, decay .1 but on what has one dimension or is called a bias; tokens decay."""
    encoder = EncoderConfig("vit_tiny_patch16_224", 32, 8, 32, 2, 2, relative_positions=relative)
    method = SLIP(CONFIG, Encoder(encoder), corpus)
    optimizer = make_optimizer(method, SLIP.optim, 4096)
    assert type(optimizer) is torch.optim.AdamW
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    table = "encoder.relative.relative_position_bias_table"
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 and name != table else 0), name
    assert (table in dict(method.named_parameters())) is relative
    assert all((g["lr"], g["betas"], g["eps"]) == (3e-3, (0.9, 0.98), 1e-8) for g in optimizer.param_groups)
    assert (SLIP.optim.warmup_fraction, SLIP.optim.warmup_lr, SLIP.optim.min_lr) == (1 / 25, 1e-6, 1e-5)
    assert SLIP.least_batch == 2 and SLIP.drops_patches


@pytest.mark.parametrize("direction", [1, -1])
def test_scale_stays_between_1_and_100(method: SLIP, direction: int) -> None:
    optimizer = torch.optim.SGD([method.logit_scale], lr=1.0)
    for step in range(100):
        optimizer.zero_grad()
        (-direction * method.logit_scale.exp()).backward()
        optimizer.step()
        method.after_step(Progress(step, 100))
        assert 0 <= method.logit_scale <= torch.tensor(math.log(100))
    assert method.report()["scale"] == pytest.approx(100 if direction > 0 else 1, rel=1e-5)


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="slip learns from text"):
        SLIP(CONFIG, encoder, Corpus())
