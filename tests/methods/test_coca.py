"""CoCa: both losses against loops, one pass of each tower, what the CLS token sees, the published sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.evals.load import view_of
from altsight.methods.base import Corpus
from altsight.methods.coca import CoCa
from altsight.nn.coca import CoCaDecoderConfig
from altsight.nn.decoding import BEAM
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.optim import make_optimizer
from tests.methods.conftest import TEXTS

CONFIG = CoCa.Config(
    decoder=CoCaDecoderConfig(unimodal_layers=2, multimodal_layers=1, width=24, heads=3, length=16), queries=5
)


def make(encoder: Encoder, corpus: Corpus, config: CoCa.Config = CONFIG) -> CoCa:
    method = CoCa(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    with torch.no_grad():  # away from an initialisation at which texts hardly differ
        for name, p in method.named_parameters():
            if name.startswith(("text.layers", "captions.layers")) and p.ndim > 1:
                p.mul_(8)
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> CoCa:
    return make(encoder, corpus)


def norm(x: Tensor, module: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def slow_layer(layer: Any, x: Tensor, image: Tensor | None) -> Tensor:
    """The last row of a pre-norm layer over x (T, W): it sees all of x."""
    normed = norm(x, layer.norm1)
    y = x[-1] + layer.attention(normed[None, -1:], normed[None])[0, 0]
    if image is not None:
        y = y + layer.cross(norm(y, layer.cross_norm)[None, None], image[None])[0, 0]
    return y + layer.mlp(norm(y, layer.norm2))


def slow_states(method: CoCa, ids: list[int]) -> Tensor:
    """States (n, W) after the text half, for tokens alone: what comes later is cut off instead of masked."""
    x = torch.stack([method.text.token_embedding.weight[i] for i in ids]) + method.text.positional_embedding[: len(ids)]
    for layer in method.text.layers:
        x = torch.stack([slow_layer(layer, x[: t + 1], None) for t in range(len(x))])
    return x


def slow_embedding(method: CoCa, ids: list[int]) -> Tensor:
    """The CLS token after the text, which has no padding here."""
    x = torch.stack([method.text.token_embedding.weight[i] for i in ids]) + method.text.positional_embedding[: len(ids)]
    x = torch.cat([x, method.text.cls[None]])
    for layer in method.text.layers:
        x = torch.stack([slow_layer(layer, x[: t + 1], None) for t in range(len(x))])
    return norm(x[-1], method.text.norm)


def slow_caption(method: CoCa, ids: list[int], image: Tensor) -> float:
    """The summed cross-entropy of one caption without padding."""
    x, total = slow_states(method, ids[:-1]), 0.0
    for layer in method.captions.layers:
        x = torch.stack([slow_layer(layer, x[: t + 1], image) for t in range(len(x))])
    logits = (norm(x, method.captions.norm) @ method.captions.head.weight.T).double()
    for scores, target in zip(logits.tolist(), ids[1:], strict=True):
        total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
    return total


def slow_contrastive(image: list[list[float]], text: list[list[float]], scale: float) -> float:
    """The sum, not the mean, of the mean cross-entropies in both directions."""
    total = 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = []
            for v in other:
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                logits.append(scale * dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)))
            total += (math.log(sum(math.exp(x) for x in logits)) - logits[i]) / len(mine)
    return total


def words_of(method: CoCa, batch: Batch) -> list[list[int]]:
    """Each text up to its end token."""
    return [text[: text.index(method.tokenizer.end) + 1] for text in batch["text"].tolist()]


@torch.no_grad()
@pytest.mark.parametrize("poolers", ["cascade", "parallel", "one"])
def test_losses_equal_reference(encoder: Encoder, corpus: Corpus, batch: Batch, poolers: Any) -> None:
    method = make(encoder, corpus, dataclasses.replace(CONFIG, poolers=poolers))
    out = method.embed(batch, key(0, 0))
    patches = encoder(encoder.normalize(batch["image"])).patches
    tokens = method.generative(patches)
    images = tokens[:, 0]
    if method.contrastive is not None:
        images = method.contrastive(tokens if poolers == "cascade" else patches)[:, 0]
    assert (method.contrastive is None) == (poolers == "one")
    texts = torch.stack([slow_embedding(method, ids) for ids in words_of(method, batch)])
    torch.testing.assert_close(out.shared["text"], texts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.shared["image"], images, rtol=1e-5, atol=1e-6)
    expected = slow_contrastive(images.tolist(), texts.tolist(), 1 / 0.07)
    assert method.loss(out.shared)["contrastive"].item() == pytest.approx(expected, rel=1e-4)
    total = sum(slow_caption(method, ids, tokens[row]) for row, ids in enumerate(words_of(method, batch)))
    assert out.local["caption"].item() == pytest.approx(total, rel=1e-4)
    assert method.counts(batch)["caption"].item() == sum(len(ids) - 1 for ids in words_of(method, batch))


def test_the_loss_is_the_weighted_sum(method: CoCa, batch: Batch) -> None:
    out, counts = method.embed(batch, key(0, 0)), method.counts(batch)
    contrastive = method.loss(out.shared)["contrastive"]
    (1.0 * contrastive + 2.0 * out.local["caption"] / counts["caption"]).backward()
    expected = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}
    method.zero_grad()
    Accumulator(method, Embed(method), seed=0)(batch)
    for name, p in method.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])


def test_one_pass_of_each_tower(method: CoCa, batch: Batch) -> None:
    calls: list[str] = []
    for name in ("encoder", "generative", "contrastive", "text.layers.0", "captions.layers.0"):
        method.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    method.embed(batch, key(0, 0))
    assert sorted(calls) == sorted(set(calls)) and len(calls) == 5


def test_padding_is_not_seen_by_the_text_embedding(method: CoCa, batch: Batch) -> None:
    ids = batch["text"].clone()
    states = method.text.states(ids)
    last = ids[0].tolist().index(method.tokenizer.end)
    changed = ids.clone()
    changed[0, last + 1 :] = 77
    other = method.text.states(changed)
    assert torch.equal(method.text.embedding(other), method.text.embedding(states))
    assert torch.equal(other[0, : last + 1], states[0, : last + 1])
    shorter = method.text(ids[:, : ids[2].tolist().index(method.tokenizer.end) + 1])
    torch.testing.assert_close(method.text(ids), shorter, rtol=1e-4, atol=1e-5)
    changed[0, last - 1] = 78
    assert not torch.allclose(method.text(changed)[0], method.text(ids)[0], atol=1e-3)


def test_cls_token_is_in_no_caption(method: CoCa, batch: Batch) -> None:
    """Neither does a token see it, nor has it a place among the logits."""
    shapes: list[Any] = []
    method.captions.register_forward_hook(lambda m, inputs, output: shapes.append((inputs[0].shape, output.shape)))
    caption = method.embed(batch, key(0, 0)).local["caption"]
    assert shapes == [((3, 15, 24), (3, 15, method.tokenizer.vocab_size))]
    states = method.text.states(batch["text"])
    with torch.no_grad():
        method.text.cls.add_(1.0)
    other = method.text.states(batch["text"])
    assert torch.equal(other[:, :-1], states[:, :-1]) and not torch.allclose(other[:, -1], states[:, -1])
    assert torch.equal(method.embed(batch, key(0, 0)).local["caption"], caption)


@pytest.mark.parametrize("t", [1, 4, 7])
def test_a_token_changes_no_earlier_logits(method: CoCa, batch: Batch, t: int) -> None:
    ids, tokens = batch["text"][:, :8], torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    logits = method.captions(method.text.states(ids)[:, :-1], tokens)
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 5) % 290
    other = method.captions(method.text.states(changed)[:, :-1], tokens)
    assert torch.equal(other[:, :t], logits[:, :t])
    assert not torch.allclose(other[:, t], logits[:, t])


def test_cascade_reads_the_generative_tokens(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    poolers: Any
    for poolers, width in (("cascade", 24), ("parallel", 32)):
        method = make(encoder, corpus, dataclasses.replace(CONFIG, poolers=poolers))
        assert method.contrastive is not None and method.contrastive.key.in_features == width
        method.loss({k: v for k, v in method.embed(batch, key(0, 0)).shared.items()})["contrastive"].backward()
        assert (method.generative.queries.grad is not None) is (poolers == "cascade")


def test_view_reads_the_towers_that_were_trained(method: CoCa, batch: Batch) -> None:
    shared, view = method.eval().embed(batch, key(0, 0)).shared, view_of(method, "coca")
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(view.encode_image(batch["image"]), unit(shared["image"], dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.encode_text(TEXTS), unit(shared["text"], dim=-1), rtol=1e-4, atol=1e-5)


def test_learned_captions_come_out_again(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = CoCa(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        method.embed(batch, key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert method.caption(batch["image"], max_length=99) == list(TEXTS)
    assert method.caption(batch["image"], decoding=BEAM) == list(TEXTS)
    assert method.caption(batch["image"][:1], prefix="a red") == [TEXTS[0]]


def test_temperature(method: CoCa) -> None:
    assert method.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        method.logit_scale.fill_(9.0)
    method.after_step(Progress(0, 1))
    assert method.report()["scale"] == pytest.approx(100, rel=1e-5)


def test_adafactor_with_momentum_and_bounded_beta2(method: CoCa, batch: Batch) -> None:
    optimizer = make_optimizer(method, CoCa.optim, 65_536)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == "AdafactorBigVision"
    assert (group["lr"], group["momentum"], group["beta2_cap"], group["eps"]) == (8e-4, 0.9, 0.999, 1e-30)
    Accumulator(method, Embed(method), seed=0)(batch)
    before = [p.detach().clone() for p in method.parameters()]
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(method.parameters(), before, strict=True) if p.requires_grad]
    assert all(moved) and all(torch.isfinite(p).all() for p in method.parameters())


def test_prepare(method: CoCa, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_errors(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="coca learns from text"):
        CoCa(CONFIG, encoder, Corpus())
    with pytest.raises(UserError, match="text of 2 tokens has no room"):
        CoCa(dataclasses.replace(CONFIG, decoder=CoCaDecoderConfig(length=2)), encoder, corpus)
    with pytest.raises(UserError, match="not divisible by its 5 heads"):
        CoCa(dataclasses.replace(CONFIG, decoder=CoCaDecoderConfig(width=24, heads=5)), encoder, corpus)


PUBLISHED = [
    ("base", EncoderConfig(), CoCaDecoderConfig(), (86, 297, 383)),
    (
        "large",
        EncoderConfig("vit_large_patch16_224"),
        CoCaDecoderConfig(width=1024, heads=16),
        (303, 484, 787),
    ),
]


@pytest.mark.parametrize(("name", "encoder", "decoder", "millions"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_sizes(name: str, encoder: EncoderConfig, decoder: CoCaDecoderConfig, millions: Any) -> None:
    """Encoder, decoder and their sum, with 64,000 words; the paper leaves the two poolers out.

    A decoder of 297 M holds an embedding and an output map of their own: with a tied one it has 248 M.
    """
    vocabulary = {f"w{i}": i for i in range(64_000)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w0")), pad=0, start=1, end=2)
    encoder = dataclasses.replace(encoder, img_size=288, patch_size=18, positions="learned")
    with torch.device("meta"):
        method = CoCa(CoCa.Config(decoder=decoder), Encoder(encoder), Corpus(tokenizer))

    def size(*modules: str) -> float:
        return sum(p.numel() for m in modules for p in method.get_submodule(m).parameters()) / 1e6

    found = (size("encoder"), size("text", "captions"), size("encoder", "text", "captions"))
    assert [round(value) for value in found] == pytest.approx(millions, abs=1)
    if name == "base":
        assert [round(value) for value in found] == list(millions)
        assert round(size("generative", "contrastive")) == 5
    assert method.encoder.num_patches == 256
