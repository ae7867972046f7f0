"""VirTex: its losses against loops, what its two directions share, captions of mirrored images, its other tasks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.photometric import Photometric, photometric
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.virtex import VirTex
from altsight.nn.decoding import BEAM
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.virtex import TextualHead, TextualHeadConfig
from altsight.train.optim import make_optimizer
from tests.methods.conftest import TEXTS

CONFIG = VirTex.Config(head=TextualHeadConfig(width=24, heads=3, length=16, dropout=0.0))
TASKS = ("bicaptioning", "captioning", "token_classification", "masked_lm")


def make(encoder: Encoder, corpus: Corpus, task: Any = "bicaptioning", config: VirTex.Config = CONFIG) -> VirTex:
    method = VirTex(dataclasses.replace(config, task=task), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def extended(method: VirTex, batch: Batch) -> Batch:
    """Return the batch with what VirTex's preparation adds."""
    tensors = {
        **batch.tensors,
        "colour": torch.stack([method.config.colour.draw(key(0, i)) for i in range(len(batch))]),
    }
    mask = method.prepare(Crop(), 32).mask
    if mask is not None:
        rows = [mask(text, method.tokenizer, key(0, i)) for i, text in enumerate(batch["text"])]
        tensors["masked"] = torch.stack(rows)
    return dataclasses.replace(batch, tensors=tensors)


def head_of(method: VirTex) -> TextualHead:
    assert method.head is not None
    return method.head


def slow_norm(x: Tensor, module: Any, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias


def slow_logits(head: TextualHead, reading: str, ids: list[int], grid: Tensor) -> Tensor:
    """Logits (T, V) of one caption, token by token: what comes later is cut off instead of masked."""
    memory = grid @ head.projection.weight.T + head.projection.bias
    layer, rows = head.transformers[reading].layers[0], []
    for t in range(len(ids)):
        x = torch.stack([head.words.weight[i] + head.positions.weight[p] for p, i in enumerate(ids[: t + 1])])
        x = slow_norm(x, head.norm, 1e-8)[None]
        x = slow_norm(x + layer.self_attention(x, x), layer.self_norm)
        x = slow_norm(x + layer.cross_attention(x, memory[None]), layer.cross_norm)
        x = slow_norm(x + layer.feed_forward(x), layer.norm)
        rows.append(x[0, -1] @ head.words.weight.T + head.bias)
    return torch.stack(rows)


def slow_loss(head: TextualHead, reading: str, batch: Batch, grid: Tensor, tokenizer: Any) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, text in enumerate(batch["text"].tolist()):
        ids = text[: text.index(tokenizer.end) + 1]
        ids = ids[::-1] if reading == "backwards" else ids
        logits = slow_logits(head, reading, ids[:-1], grid[row]).double()
        for scores, target in zip(logits.tolist(), ids[1:], strict=True):
            total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
            count += 1
    return total, count


def grid_of(method: VirTex, batch: Batch) -> Tensor:
    images = photometric(batch["image"], batch["colour"])
    return method.encoder(method.encoder.normalize(images)).patches


@torch.no_grad()
def test_losses_equal_reference(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus)
    head_of(method).words.weight.mul_(30)  # away from uniform predictions
    batch = extended(method, batch)
    local, counts = method.embed(batch, key(0, 0)).local, method.counts(batch)
    grid = grid_of(method, batch)
    assert list(local) == list(counts) == ["onwards", "backwards"]
    for reading in ("onwards", "backwards"):
        total, count = slow_loss(head_of(method), reading, batch, grid, method.tokenizer)
        assert local[reading].item() == pytest.approx(total, rel=1e-4)
        assert counts[reading].item() == count
    assert local["onwards"].item() != pytest.approx(local["backwards"].item(), rel=1e-3)


def test_captioning_is_the_onwards_half(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    both, one = make(encoder, corpus), make(encoder, corpus, "captioning")
    found = one.load_state_dict(
        {n: v for n, v in both.state_dict().items() if "transformers.backwards" not in n}, strict=True
    )
    assert not found.missing_keys
    batch = extended(both, batch)
    local = one.embed(batch, key(0, 0)).local
    assert list(local) == ["onwards"]
    assert torch.equal(local["onwards"], both.embed(batch, key(0, 0)).local["onwards"])


def test_directions_share_all_but_their_transformers(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    one, both = make(encoder, corpus, "captioning"), make(encoder, corpus)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in head_of(both).transformers.items()}
    assert sizes["onwards"] == sizes["backwards"]
    assert summed(both) == summed(one) + sizes["backwards"]
    used: dict[str, list[int]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda m, inputs, output: used.setdefault(name, []).append(id(m)))

    head = head_of(both)
    for name in ("projection", "words", "norm"):
        watch(name, head.get_submodule(name))
    for reading in ("onwards", "backwards"):
        watch(reading, head.transformers[reading])
    both.embed(extended(both, batch), key(0, 0))
    assert {name: (len(ids), len(set(ids))) for name, ids in used.items()} == {
        "projection": (1, 1),
        "words": (2, 1),
        "norm": (2, 1),
        "onwards": (1, 1),
        "backwards": (1, 1),
    }
    assert used["onwards"] != used["backwards"]


def summed(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_palindrome_costs_the_same_in_both_directions(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    """With equal transformers; start and end are the one pair that a palindrome cannot have, so they are made equal."""
    method = make(encoder, corpus)
    head = head_of(method)
    head.transformers["backwards"].load_state_dict(head.transformers["onwards"].state_dict())
    start, end = method.tokenizer.start, method.tokenizer.end
    with torch.no_grad():
        head.words.weight[start] = head.words.weight[end]
        head.bias[start] = head.bias[end]
    text = torch.tensor([[start, 40, 41, 42, 41, 40, end] + [0] * 9] * 3)
    batch = extended(method, dataclasses.replace(batch, tensors={**batch.tensors, "text": text}))
    local = method.embed(batch, key(0, 0)).local
    assert local["onwards"].item() == pytest.approx(local["backwards"].item(), rel=1e-6)
    text[:, 5] = 43
    local = method.embed(batch, key(0, 0)).local
    assert local["onwards"].item() != pytest.approx(local["backwards"].item(), rel=1e-6)


@pytest.mark.parametrize("reading", ["onwards", "backwards"])
def test_a_token_changes_no_earlier_logits(encoder: Encoder, corpus: Corpus, batch: Batch, reading: Any) -> None:
    head = head_of(make(encoder, corpus))
    ids, memory = batch["text"][:, :8].clone(), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    text = torch.ones_like(ids, dtype=torch.bool)
    logits = head(ids, text, memory, reading)
    for t in range(1, 8):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 7) % 290
        other = head(changed, text, memory, reading)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


def test_padding_is_embedded_as_zero(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    head, entering = head_of(make(encoder, corpus)), list[Tensor]()
    head.transformers["onwards"].register_forward_hook(lambda m, inputs, output: entering.append(inputs[0]))
    text = torch.tensor([[True, True, False, False]] * 3)
    head(batch["text"][:, :4], text, torch.zeros(3, 2, 24), "onwards")
    assert (entering[0][:, 2:] == 0).all() and (entering[0][:, :2] != 0).all()


def test_mask_is_drawn_over_words_alone(encoder: Encoder, corpus: Corpus) -> None:
    method = make(encoder, corpus, "masked_lm", dataclasses.replace(CONFIG, mask_share=0.15))
    mask, tokenizer = method.prepare(Crop(), 32).mask, method.tokenizer
    assert mask is not None
    text = torch.tensor([tokenizer.start, *range(40, 60), tokenizer.end, tokenizer.pad, tokenizer.pad])
    hidden = other = 0
    for position in range(600):
        masked = mask(text, tokenizer, key(0, position))
        changed = (masked != text).nonzero().flatten().tolist()
        assert set(changed) <= set(range(1, 21)) and len(changed) <= 3  # 15 % of 20 words
        hidden += int((masked == tokenizer.vocab_size).sum())
        other += int(((masked != text) & (masked != tokenizer.vocab_size)).sum())
    assert hidden / 1800 == pytest.approx(0.85, abs=0.025)
    assert other / 1800 == pytest.approx(0.10, abs=0.02)
    short = torch.tensor([tokenizer.start, 40, tokenizer.end, tokenizer.pad])
    # At least one word, and a single one is always hidden.
    assert all(mask(short, tokenizer, key(0, i))[1] == tokenizer.vocab_size for i in range(40))
    empty = torch.tensor([tokenizer.start, tokenizer.end, tokenizer.pad])
    assert torch.equal(mask(empty, tokenizer, key(0, 0)), empty)


def test_masked_words_are_predicted_from_both_sides(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus, "masked_lm")
    tokenizer, head = method.tokenizer, head_of(method)
    with torch.no_grad():
        head.words.weight.mul_(30)
    text = batch["text"][:1].clone()
    masked = text.clone()
    masked[0, 2] = tokenizer.vocab_size
    masked[0, 4] = 77  # replaced by another token: seen, but no target
    batch = extended(method, batch.part(0, 1))
    batch.tensors.update(text=text, masked=masked)
    assert method.counts(batch)["masked"].item() == 1
    length = text[0].tolist().index(tokenizer.end) + 1
    memory = head.projection(grid_of(method, batch))
    no_padding = torch.ones(1, length, dtype=torch.bool)
    scores = head(masked[:, :length], no_padding, memory, "both ways")[0, 2].double()
    expected = scores.exp().sum().log() - scores[text[0, 2]]
    assert method.embed(batch, key(0, 0)).local["masked"].item() == pytest.approx(expected.item(), rel=1e-5)
    later = masked.clone()
    later[0, 5] = 78
    other = head(later[:, :length], no_padding, memory, "both ways")[0, 2]
    assert not torch.allclose(other.double(), scores)


def test_token_classification_equals_reference(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus, "token_classification")
    batch = extended(method, batch)
    assert method.classifier is not None
    logits = method.classifier(grid_of(method, batch).mean(dim=1)).double()
    total = 0.0
    for row, text in enumerate(batch["text"].tolist()):
        words = set(text) - {method.tokenizer.pad, method.tokenizer.start, method.tokenizer.end}
        norm = math.log(sum(math.exp(s) for s in logits[row].tolist()))
        total += sum(norm - logits[row, word].item() for word in words) / len(words)
    assert method.embed(batch, key(0, 0)).local["tokens"].item() == pytest.approx(total, rel=1e-5)
    assert method.counts(batch)["tokens"].item() == 3


@pytest.mark.parametrize("task", TASKS)
def test_every_trained_parameter_gets_a_gradient(encoder: Encoder, corpus: Corpus, batch: Batch, task: str) -> None:
    method = make(encoder, corpus, task)
    out = method.embed(extended(method, batch), key(0, 0))
    torch.stack(list(out.local.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


def test_only_tasks_that_write_have_captions(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    for task in TASKS:
        assert hasattr(make(encoder, corpus, task), "caption") is ("captioning" in task)
    method = make(encoder, corpus)
    with torch.no_grad():
        head_of(method).words.weight.mul_(30)
    captions = method.caption(batch["image"], max_length=99, prefix="a")
    assert len(captions) == 3 and all(caption.startswith("a") for caption in captions)


def test_learned_captions_come_out_again(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    config = dataclasses.replace(CONFIG, colour=Photometric(jitter=0.0, grey=0.0, blur=0.0))
    method = make(encoder, corpus, config=config)
    batch = extended(method, batch)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        method.embed(batch, key(0, 0)).local["onwards"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert method.caption(batch["image"]) == list(TEXTS)
    assert method.caption(batch["image"], decoding=BEAM) == list(TEXTS)


def test_prepare_turns_the_caption_with_the_image(
    encoder: Encoder, corpus: Corpus, document: Callable[..., Document]
) -> None:
    method, crop = make(encoder, corpus), Crop()
    prepare, tokenizer = method.prepare(crop, 32), method.tokenizer
    seen = set()
    for position in range(12):
        at = key(0, position)
        example = prepare(document(text="left, bright"), at)
        assert example is not None
        expected = "right, bright" if crop.flips(at) else "left, bright"
        assert tokenizer.decode(example["text"].tolist()) == expected
        assert torch.equal(example["image"], crop(document().images[0], 32, at))
        assert torch.equal(example["colour"], method.config.colour.draw(at))
        seen.add(expected)
    assert len(seen) == 2
    assert prepare(document(text=None), key(0, 0)) is None
    straight = method.prepare(dataclasses.replace(crop, flip=False), 32)(document(text="left"), key(0, 1))
    assert straight is not None and tokenizer.decode(straight["text"].tolist()) == "left"


def test_two_learning_rates_and_lookahead(encoder: Encoder, corpus: Corpus) -> None:
    method = make(encoder, corpus)
    optimizer = make_optimizer(method, VirTex.optim, 256)
    names = {id(p): name for name, p in method.named_parameters()}
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and not group["nesterov"]
        for p in group["params"]:
            rate = group["lr"] * group["lr_scale"] if "lr_scale" in group else group["lr"]
            assert rate == pytest.approx(0.2 if names[id(p)].startswith("encoder.") else 0.001)
    assert type(optimizer).__name__ == "Lookahead"


def test_gains_and_biases_of_the_transformers_do_not_decay_and_those_of_the_cnn_do(corpus: Corpus) -> None:
    """Specification 9.3: no decay of norm and bias in the text's embedding and transformer."""
    method = make(Encoder(EncoderConfig("test_resnet", img_size=32)), corpus)
    groups = make_optimizer(method, VirTex.optim, 256).param_groups
    still = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in still}
    assert {"head.norm.weight", "head.norm.bias"} < names
    rest = names - {"head.norm.weight", "head.norm.bias"}
    assert all(re.match(r"head\.transformers\..*(norm|bias)", name) for name in rest) and rest
    kept = {name for name, p in method.named_parameters() if id(p) not in still}
    assert {"head.bias", "head.projection.bias", "encoder.backbone.bn1.weight"} < kept


def test_resnet_50_reads_a_grid_of_49(corpus: Corpus) -> None:
    """The source's sizes on its own backbone: 7 x 7 x 2048 -> 2048; one transformer of 32 heads, 8192 inside."""
    with torch.device("meta"):
        method = VirTex(VirTex.Config(), Encoder(EncoderConfig("resnet50")), corpus)
    head, width = head_of(method), 2048
    assert method.encoder.num_patches == 49 and method.encoder.width == 2048

    def linear(a: int, b: int) -> int:
        return a * b + b

    layer = 8 * linear(width, width) - 2 * width + linear(width, 8192) + linear(8192, width) + 3 * 2 * width
    shared = linear(2048, width) + (corpus.need_tokenizer("tests").vocab_size + 30) * width + 2 * width
    shared += corpus.need_tokenizer("tests").vocab_size
    assert summed(head) == shared + 2 * layer
    assert sum(p.numel() for p in method.encoder.parameters()) == 23_508_032


def test_needs_text_and_heads_that_fit(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="virtex learns from text"):
        VirTex(CONFIG, encoder, Corpus())
    with pytest.raises(UserError, match="not divisible by its 5 heads"):
        make(encoder, corpus, config=dataclasses.replace(CONFIG, head=TextualHeadConfig(width=24, heads=5)))
