"""SigLIP's loss against loops over the formula, what its towers read, what decays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.siglip import SigLIP
from altsight.nn.encoder import Encoded, Encoder, EncoderConfig
from altsight.nn.text import TextConfig
from altsight.train.optim import parameter_groups

TEXT = TextConfig(
    width=32, heads=2, layers=1, context=16, causal=False, pool="last", pad_with_end=True, projection_bias=True
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> SigLIP:
    method = SigLIP(SigLIP.Config(text=TEXT), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def slow_loss(image: list[list[float]], text: list[list[float]], scale: float, bias: float) -> float:
    """-1/B sum_ij log sigmoid(z_ij (scale cos_ij + bias)), from un-normalised features, pair by pair."""
    total = 0.0
    for i, u in enumerate(image):
        for j, v in enumerate(text):
            cosine = sum(a * b for a, b in zip(u, v, strict=True))
            cosine /= math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))
            logit = (scale * cosine + bias) * (1 if i == j else -1)
            total += math.log(1 + math.exp(-logit))
    return total / len(image)


def test_loss_equals_reference(method: SigLIP, batch: Batch) -> None:
    shared = method.embed(batch, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"image": (3, 32), "text": (3, 32)}
    features = shared["image"].tolist(), shared["text"].tolist()
    assert method.loss(shared)["sigmoid"].item() == pytest.approx(slow_loss(*features, 10, -10), rel=1e-5)
    with torch.no_grad():
        method.log_scale.fill_(math.log(3))
        method.bias.fill_(-1)
    assert method.loss(shared)["sigmoid"].item() == pytest.approx(slow_loss(*features, 3, -1), rel=1e-5)


def test_scale_and_bias_start_where_nearly_no_pair_matches(method: SigLIP) -> None:
    assert method.report() == {"scale": pytest.approx(10), "bias": -10}


def test_every_trained_parameter_gets_a_gradient(method: SigLIP, batch: Batch) -> None:
    method.loss(method.embed(batch, key(0, 0)).shared)["sigmoid"].backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


def test_image_is_what_attention_pools_from_the_patches(method: SigLIP, batch: Batch) -> None:
    encoded = method.encoder(method.encoder.normalize(batch["image"]))
    image = method.embed(batch, key(0, 0)).shared["image"]
    torch.testing.assert_close(image, method.pool(encoded.tokens[:, 3:]))  # without 1 CLS and 2 registers
    other = Encoded(encoded.tokens.clone(), encoded.prenorm, encoded.prefix, encoded.layers)
    other.tokens[:, :3] = 7
    assert torch.equal(method.embed_image(other), method.embed_image(encoded))
    assert method.image_projection is None, "the source has none either"
    mean = encoded.tokens[:, 3:].mean(dim=1)
    assert torch.equal(method.encoder.point(encoded, method.feature_point), mean), "frozen features stay comparable"


def test_text_is_read_both_ways_and_at_its_last_end_token(corpus: Corpus, method: SigLIP) -> None:
    ids = method.text.encode(["two dogs", "a red house"])
    tokenizer = corpus.need_tokenizer("tests")
    assert torch.equal(method.text(ids.masked_fill(ids == tokenizer.pad, 10)), method.text(ids))
    for place in (1, 2):
        other = ids.clone()
        other[:, place] = 11
        assert not torch.allclose(method.text(other), method.text(ids))
    states: list[torch.Tensor] = []
    method.text.blocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    feature = method.text(ids)
    last = method.text.ln_final(states[0][:, 15])
    torch.testing.assert_close(feature, method.text.text_projection(last))
    assert method.text.text_projection.bias is not None


def test_defaults_are_those_of_siglip_b(corpus: Corpus) -> None:
    with torch.device("meta"):
        method = SigLIP(SigLIP.Config(), Encoder(EncoderConfig()), corpus)
    text = method.text
    assert (text.config.width, text.config.heads, len(text.blocks), text.context) == (768, 12, 12, 64)
    assert text.text_projection.out_features == 768 and method.pool.pool.heads == 12
    assert isinstance(text.blocks[0].mlp.act, torch.nn.GELU)


def test_decay_groups(method: SigLIP) -> None:
    """Only maps decay: no biases, norms, embeddings, tokens, scale or bias."""
    method.encoder.backbone.pos_embed.requires_grad_(True)
    decayed = {id(p) for g in parameter_groups(method, SigLIP.optim) if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in decayed}
    exempt = {name for name, p in method.named_parameters() if p.ndim > 1} - names
    assert exempt == {
        "encoder.backbone.cls_token",
        "encoder.backbone.reg_token",
        "encoder.backbone.pos_embed",
        "text.positional_embedding",
        "text.token_embedding.weight",
        "pool.pool.queries",
    }
    assert {"pool.pool.key.weight", "pool.mlp.fc1.weight", "encoder.backbone.patch_embed.proj.weight"} <= names
    assert all(p.ndim > 1 for name, p in method.named_parameters() if name in names)


def test_patch_dropout_is_heeded(method: SigLIP, batch: Batch) -> None:
    whole = method.embed(batch, key(0, 0)).shared["image"]
    batch.tensors["visible"] = batch["keep"]
    encoded = method.encoder(method.encoder.normalize(batch["image"]), batch["keep"])
    part = method.embed(batch, key(0, 0)).shared["image"]
    assert torch.equal(part, method.embed_image(encoded)) and not torch.allclose(part, whole)


def test_a_net_without_heads(corpus: Corpus, batch: Batch) -> None:
    method = SigLIP(SigLIP.Config(text=TEXT), Encoder(EncoderConfig("resnet18", img_size=32)), corpus)
    method.init_weights(key(0, 0))
    assert method.pool.pool.heads == 8
    assert method.embed(batch, key(0, 0)).shared["image"].shape == (3, 512)


def test_prepare(method: SigLIP, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="siglip learns from text"):
        SigLIP(SigLIP.Config(text=TEXT), encoder, Corpus())
