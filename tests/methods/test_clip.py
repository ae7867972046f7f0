"""CLIP's loss against loops over the formula, its temperature, its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tokenizers
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from tokenizers import models

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.clip import CLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig

CONFIG = CLIP.Config(text=TextConfig(width=32, heads=2, layers=1, context=16), embed_dim=24)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> CLIP:
    method = CLIP(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def slow_loss(image: list[list[float]], text: list[list[float]], scale: float) -> float:
    """Both cross-entropies, from un-normalised features, pair by pair."""
    total = 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = []
            for v in other:
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                logits.append(scale * dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)))
            total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return total / (2 * len(image))


def test_loss_equals_reference(method: CLIP, batch: Batch) -> None:
    shared = method.embed(batch, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"image": (3, 24), "text": (3, 24)}
    expected = slow_loss(shared["image"].tolist(), shared["text"].tolist(), 1 / 0.07)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-5)


def test_image_feature_is_the_projected_mean_of_the_patches(method: CLIP, batch: Batch) -> None:
    encoded = method.encoder(method.encoder.normalize(batch["image"]))
    mean = torch.stack([tokens[3:].sum(dim=0) / 16 for tokens in encoded.tokens])  # 1 CLS, 2 registers, 16 patches
    expected = mean @ method.image_projection.weight.T
    torch.testing.assert_close(method.embed(batch, key(0, 0)).shared["image"], expected, rtol=1e-4, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient(method: CLIP, batch: Batch) -> None:
    method.loss(method.embed(batch, key(0, 0)).shared)["contrastive"].backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


@pytest.mark.parametrize("direction", [1, -1])
def test_scale_stays_between_1_and_100(method: CLIP, direction: int) -> None:
    limit = torch.tensor(math.log(100))
    optimizer = torch.optim.SGD([method.logit_scale], lr=1.0)
    for step in range(1000):
        optimizer.zero_grad()
        (-direction * method.logit_scale.exp()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.after_step(Progress(step, 1000))
        assert 0 <= method.logit_scale <= limit
    assert method.report()["scale"] == pytest.approx(100 if direction > 0 else 1, rel=1e-5)


def test_decay_groups(method: CLIP) -> None:
    method.encoder.backbone.pos_embed.requires_grad_(True)
    groups = param_groups_weight_decay(method, 0.2, no_weight_decay_list=method.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in decayed}
    exempt = {name for name, p in method.named_parameters() if p.ndim > 1} - names
    assert exempt == {
        "encoder.backbone.cls_token",
        "encoder.backbone.reg_token",
        "encoder.backbone.pos_embed",
        "text.positional_embedding",
    }
    assert "text.token_embedding.weight" in names
    assert all(p.ndim > 1 for name, p in method.named_parameters() if name in names)
    assert "logit_scale" not in names


def test_towers_are_where_the_view_looks_for_them(method: CLIP) -> None:
    assert method.text is method.get_submodule("text")
    assert method.image_projection is method.get_submodule("image_projection")
    assert method.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_prepare(method: CLIP, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="clip learns from text"):
        CLIP(CONFIG, encoder, Corpus())


@pytest.mark.parametrize(("patch", "millions"), [(32, 151.28), (16, 149.62)])
@pytest.mark.parametrize("model", ["vit_base_patch{}_224", "vit_base_patch{}_clip_quickgelu_224"])
def test_clip_b_has_the_published_size(patch: int, millions: float, model: str) -> None:
    vocabulary = {"<|startoftext|>": 49406, "<|endoftext|>": 49407} | {f"w{i}": i for i in range(49406)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w0")), pad=0, start=49406, end=49407)
    config = EncoderConfig(model.format(patch), positions="learned", pre_norm=True, quick_gelu=True)
    with torch.device("meta"):
        method = CLIP(CLIP.Config(), Encoder(config), Corpus(tokenizer))
    assert method.encoder.backbone.patch_embed.proj.bias is None
    assert round(sum(p.numel() for p in method.parameters()) / 1e6, 2) == millions
