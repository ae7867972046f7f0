"""VisualGPT: its loss against loops, its language model, its captions; the gates are in tests/nn/test_gated.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.visualgpt import VisualGPT
from altsight.nn.decoding import BEAM
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.gated import GatedConfig
from tests.methods.conftest import TEXTS

CONFIG = VisualGPT.Config(
    decoder=GatedConfig(
        width=24, heads=3, layers=1, length=16, visual_hidden=32, dropout=0.0, cross_dropout=0.0, levels=2
    )
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> VisualGPT:
    method = VisualGPT(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def decoded(method: VisualGPT, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The logits inside of `embed`, and the levels that the decoder was given."""
    caught: list[tuple[Tensor, list[Tensor]]] = []
    handle = method.decoder.register_forward_hook(lambda m, inputs, output: caught.append((output.detach(), inputs[1])))
    method.embed(batch, key(0, 0))
    handle.remove()
    return caught[0]


def slow_caption_sum(logits: Tensor, ids: Tensor, end: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, text in enumerate(ids.tolist()):
        for t, target in enumerate(text[1 : text.index(end) + 1]):
            scores = logits[row, t].double().tolist()
            total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
            count += 1
    return total, count


def test_loss_equals_reference(method: VisualGPT, batch: Batch) -> None:
    with torch.no_grad():
        method.decoder.words.weight.mul_(20)
    local = method.embed(batch, key(0, 0)).local
    logits, levels = decoded(method, batch)
    total, count = slow_caption_sum(logits, batch["text"], method.tokenizer.end)
    assert local["caption"].item() == pytest.approx(total, rel=1e-5)
    assert method.counts(batch)["caption"].item() == count
    assert [tuple(level.shape) for level in levels] == [(3, 16, 24)] * 2  # patches alone


def test_every_trained_parameter_gets_a_gradient(method: VisualGPT, batch: Batch) -> None:
    method.embed(batch, key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


def test_learned_captions_come_out_again(method: VisualGPT, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        method.embed(batch, key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert method.caption(batch["image"], max_length=99) == list(TEXTS)
    assert method.caption(batch["image"], decoding=BEAM) == list(TEXTS)
    assert method.caption(batch["image"][:1], prefix="a red") == [TEXTS[0]]


def test_starts_from_the_language_model(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    vocabulary = corpus.need_tokenizer("tests").vocab_size
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=16, n_embd=24, n_layer=1, n_head=3))
    gpt2.save_pretrained(tmp_path)
    config = dataclasses.replace(CONFIG, language_model=str(tmp_path))
    method = VisualGPT(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    ids = torch.tensor([[1, 44, 70, 20]])
    assert (method.decoder(ids) - gpt2.eval()(ids).logits).abs().max() <= 1e-5
    other = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=24, n_layer=1, n_head=3))
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"knows 99 tokens and the data set {vocabulary}"):
        method.init_weights(key(0, 0, "init"))


def test_prepare(method: VisualGPT, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_gpt2_small_has_124_million_parameters_besides_what_is_new(corpus: Corpus) -> None:
    """GPT-2 small: 124.4 M, of which 1024 positions; new in each block: four maps, three gates of two states."""
    with torch.device("meta"):
        method = VisualGPT(VisualGPT.Config(), Encoder(EncoderConfig("vit_base_patch16_224")), corpus)
    new = sum(p.numel() for name, p in method.decoder.named_parameters() if ".cross." in name or ".alphas." in name)
    assert new == 12 * (4 * 768 * 768 + 3 * 768 + 3 * (2 * 768 * 768 + 768))
    vocabulary = corpus.need_tokenizer("tests").vocab_size
    rest = sum(p.numel() for p in method.decoder.parameters()) - new
    # Keys have no bias here, one in each of 12 blocks of GPT-2.
    assert rest + 12 * 768 + (50257 - vocabulary + 1024 - 40) * 768 == 124_439_808


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="visualgpt learns from text"):
        VisualGPT(CONFIG, encoder, Corpus())
