"""Supervised: the smoothed cross-entropy against loops over the formula, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.supervised import Supervised
from altsight.nn.encoder import Encoder, EncoderConfig


def make(encoder: Encoder, corpus: Corpus, smoothing: float = 0.1) -> Supervised:
    method = Supervised(Supervised.Config(label_smoothing=smoothing), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def slow_loss_sum(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """Cross-entropy with the target (1 - smoothing) on the label and smoothing / classes everywhere."""
    total = 0.0
    for scores, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        normalizer = math.log(sum(math.exp(s) for s in scores))
        for c, score in enumerate(scores):
            wanted = smoothing / len(scores) + (1 - smoothing) * (c == label)
            total -= wanted * (score - normalizer)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_reference(encoder: Encoder, corpus: Corpus, batch: Batch, smoothing: float) -> None:
    method = make(encoder, corpus, smoothing)
    with torch.no_grad():
        method.head.weight.mul_(50)
        method.head.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    encoded = encoder(encoder.normalize(batch["image"]))
    mean = encoded.tokens[:, 3:].mean(dim=1)  # 1 CLS, 2 registers, 16 patches
    logits = mean @ method.head.weight.T + method.head.bias
    loss = method.embed(batch, key(0, 0)).local["classification"]
    assert loss.item() == pytest.approx(slow_loss_sum(logits.detach(), batch["label"], smoothing), rel=1e-5)
    assert method.counts(batch)["classification"].item() == 3


@pytest.mark.parametrize("model", ["vit", "resnet18"])
def test_every_trained_parameter_gets_a_gradient(encoder: Encoder, corpus: Corpus, batch: Batch, model: str) -> None:
    backbone = encoder if model == "vit" else Encoder(EncoderConfig(model, img_size=32))
    method = make(backbone, corpus)
    method.embed(batch, key(0, 0)).local["classification"].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_prepare(encoder: Encoder, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), make(encoder, corpus).prepare(Crop(), 32)
    example = prepare(document(label=2), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["label"], torch.tensor(2))
    assert prepare(document(label=None), at) is None


def test_needs_labels(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="supervised learns from labels"):
        Supervised(Supervised.Config(), encoder, Corpus())
