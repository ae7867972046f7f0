"""ALIGN's loss against loops over the formula, its temperature, its towers, its optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.methods.align import ALIGN
from altsight.methods.base import Corpus
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.language import BertTowerConfig
from altsight.train.optim import make_optimizer
from altsight.train.schedule import Schedule

CONFIG = ALIGN.Config(text=BertTowerConfig(width=32, heads=2, layers=1, context=16))


def make(encoder: Encoder, corpus: Corpus, config: ALIGN.Config = CONFIG) -> ALIGN:
    method = ALIGN(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> ALIGN:
    return make(encoder, corpus)


def slow_loss(image: list[list[float]], text: list[list[float]], sigma: float, smoothing: float) -> float:
    """The sum of both directions: cross-entropy with smoothed targets of cosine / sigma, pair by pair."""
    n, total = len(image), 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = []
            for v in other:
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                logits.append(dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)) / sigma)
            log_total = math.log(sum(math.exp(x) for x in logits))
            for j, logit in enumerate(logits):
                target = (1 - smoothing) * (i == j) + smoothing / n
                total -= target * (logit - log_total) / n
    return total


@pytest.mark.parametrize(("sigma", "smoothing"), [(1.0, 0.1), (0.05, 0.1), (0.05, 0.0), (1.0, 0.5)])
def test_loss_equals_reference(encoder: Encoder, corpus: Corpus, batch: Batch, sigma: float, smoothing: float) -> None:
    config = dataclasses.replace(CONFIG, temperature=sigma, label_smoothing=smoothing)
    method = make(encoder, corpus, config)
    shared = method.embed(batch, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"image": (3, 32), "text": (3, 32)}
    expected = slow_loss(shared["image"].tolist(), shared["text"].tolist(), sigma, smoothing)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_computed_in_fp32_under_autocast(method: ALIGN, batch: Batch) -> None:
    shared = method.embed(batch, key(0, 0)).shared
    expected = method.loss(shared)["contrastive"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.loss(shared)["contrastive"], expected)


def test_defaults_are_the_sources() -> None:
    config = ALIGN.Config()
    assert (config.temperature, config.label_smoothing, config.text.context) == (1.0, 0.1, 64)
    assert (config.text.width, config.text.heads, config.text.layers) == (768, 12, 12)


def test_image_has_a_map_only_to_a_width_of_its_own(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus)
    encoded = encoder(encoder.normalize(batch["image"]))
    mean = torch.stack([tokens[3:].sum(dim=0) / 16 for tokens in encoded.tokens])  # 1 CLS, 2 registers, 16 patches
    torch.testing.assert_close(method.embed(batch, key(0, 0)).shared["image"], mean, rtol=1e-4, atol=1e-5)
    assert method.image_projection is None
    mapped = make(encoder, corpus, dataclasses.replace(CONFIG, embed_dim=24))
    shared = mapped.embed(batch, key(0, 0)).shared
    assert isinstance(mapped.image_projection, nn.Linear)
    expected = mean @ mapped.image_projection.weight.T + mapped.image_projection.bias
    torch.testing.assert_close(shared["image"], expected, rtol=1e-4, atol=1e-5)
    assert shared["text"].shape == (3, 24)


@pytest.mark.parametrize("embed_dim", [None, 24])
def test_every_trained_parameter_gets_a_gradient(
    encoder: Encoder, corpus: Corpus, batch: Batch, embed_dim: int | None
) -> None:
    method = make(encoder, corpus, dataclasses.replace(CONFIG, embed_dim=embed_dim))
    method.loss(method.embed(batch, key(0, 0)).shared)["contrastive"].backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


def test_temperature_is_a_divisor_that_stays_positive(method: ALIGN) -> None:
    """Pushed down for longer than it takes to reach 0, it ends at its floor."""
    assert method.report() == {"temperature": 1.0}
    optimizer = torch.optim.SGD([method.temperature], lr=0.01)
    seen = []
    for step in range(200):
        optimizer.zero_grad()
        (3 * method.temperature).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.after_step(Progress(step, 200))
        seen.append(method.temperature.item())
    assert seen[9] == pytest.approx(0.7) and seen[-1] == pytest.approx(0.01)
    assert min(seen) > 0.009


def test_lamb_clips_once_decays_maps_only_and_the_rate_falls_on_a_line(method: ALIGN) -> None:
    optimizer = make_optimizer(method, ALIGN.optim, 16384)
    assert type(optimizer).__name__ == "Lamb"
    assert optimizer.defaults["max_grad_norm"] == 1 and ALIGN.optim.clip_norm == 0
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0, 1e-5}
    assert all((id(p) in decayed) is (p.ndim > 1) for p in method.parameters() if p.requires_grad)
    schedule, steps = Schedule(optimizer, ALIGN.optim, 1200, 16384), (0, 5, 10, 400, 800, 1200)
    rates = []
    for step in steps:
        schedule.update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 5e-4, (1 - 10 / 1200) * 1e-3, 2e-3 / 3, 1e-3 / 3, 0], rel=1e-3, abs=1e-9)


def test_a_step_with_an_efficientnet(corpus: Corpus, batch: Batch) -> None:
    """The source's family of image towers; steps of LAMB take the loss down."""
    encoder = Encoder(EncoderConfig("efficientnet_b0", img_size=64))
    method = make(encoder, corpus, dataclasses.replace(CONFIG, embed_dim=24, temperature=0.1)).train()
    batch.tensors["image"] = nn.functional.interpolate(batch["image"].float(), 64).byte()
    optim = dataclasses.replace(ALIGN.optim, lr=1e-2)
    optimizer = make_optimizer(method, optim, 3)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    losses = []
    for step in range(3):
        loss = method.loss(method.embed(batch, key(0, 0)).shared)["contrastive"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert not [name for name, p in method.named_parameters() if p.grad is None]
        optimizer.step()
        method.after_step(Progress(step, 3))
        losses.append(loss.item())
    assert encoder.width == 1280 and losses[2] < losses[0]
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert {"encoder.backbone.conv_stem.weight", "encoder.backbone.conv_head.weight", "temperature"} <= moved
    assert method.eval().embed(batch, key(0, 0)).shared["image"].shape == (3, 24)


def test_bert_base_has_its_published_size(corpus: Corpus) -> None:
    """109.48 million without the pooler and positions past 64, but with a map to the joint space of 2,048 of a B5."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 30522)}
    bert = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w3")), pad=0, start=1, end=2)
    with torch.device("meta"):
        method = ALIGN(ALIGN.Config(), Encoder(EncoderConfig("efficientnet_b5", img_size=289)), Corpus(bert))
    found = sum(p.numel() for p in method.text.parameters())
    assert found == 109_482_240 - 768 * 769 - (512 - 64) * 768 + 769 * 2048
    assert method.encoder.width == 2048


def test_prepare(method: ALIGN, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="align learns from text"):
        ALIGN(CONFIG, encoder, Corpus())
