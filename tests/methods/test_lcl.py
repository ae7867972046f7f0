"""LCL: its losses against loops over the formula, and what its language model sees."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.losses.latent import text_targets
from altsight.methods.base import Corpus, Samples
from altsight.methods.lcl import LCL
from altsight.nn.encoder import Encoder
from altsight.nn.interleaved import LanguageConfig
from altsight.train.accumulate import Accumulator, Embed
from tests.methods.made_documents import (
    DOCUMENTS,
    HEADS,
    WIDTH,
    batch_of,
    build,
    document,
    embed,
    words,
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> LCL:
    return build(encoder, corpus)


# A slow reference: one sequence at a time, token by token, from the weights alone.


def slow_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def slow_latents(method: LCL, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (16, W) and the pooled vector (W,) of one picture, head by head."""
    patches = method.encoder(method.encoder.normalize(image[None])).tokens[0, 3:]  # behind CLS and two registers
    p, a = method.project, method.project.attention
    assert a is not None
    values = slow_norm(patches, p.norm) @ p.value.weight.T + p.value.bias
    query = (slow_norm(a.query, a.query_norm) @ a.query_map.weight.T + a.query_map.bias)[0]
    keys = slow_norm(patches, a.key_norm) @ a.key_map.weight.T + a.key_map.bias
    pooled = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        scores = [math.exp(float(k @ query[part]) / math.sqrt(WIDTH / HEADS)) for k in keys[:, part]]
        pooled.append(sum(s / sum(scores) * v for s, v in zip(scores, values[:, part], strict=True)))
    return values @ p.out.weight.T, torch.cat(pooled) @ p.out.weight.T  # type: ignore[arg-type]


def slow_states(method: LCL, ids: list[int], latents: list[Tensor]) -> Tensor:
    """Return the states (T, W) of one sequence, in which token t is computed from tokens 0 ... t alone."""
    tokens = iter(torch.cat(latents) if latents else [])
    language, rows = method.language, []
    for place, token in enumerate(ids):
        embedded = next(tokens) if token == method.markers.image else language.token_embedding.weight[token]
        rows.append(embedded + language.positional_embedding[place])
    states = []
    for stop in range(1, len(ids) + 1):
        x = torch.stack(rows[:stop])[None]
        for block in language.blocks[:-1]:
            x = block(x, is_causal=True)
        # The last token of a sequence sees all of it, so that in the last layer no mask is needed.
        states.append(language.blocks[-1](x)[0, -1])
    return torch.stack(states)


def slow(method: LCL, batch: Batch) -> dict[str, Any]:
    """Return the generation loss and its count, the rows of the contrast, and the regression loss, by loops."""
    m = method.markers
    generation, count, regression = 0.0, 0, 0.0
    images, contexts = [], []
    for row in range(len(batch)):
        ids = batch["text"][row, : batch["length"][row]].tolist()
        pictures = batch["image"][row, : batch["images"][row]]
        found = [slow_latents(method, image) for image in pictures]
        states = slow_states(method, ids, [tokens for tokens, _ in found])
        flat = torch.cat([tokens for tokens, _ in found])
        seen = started = 0
        for place, token in enumerate(ids):
            if token == m.start_of_image:
                if place > 0 and method.context_head is not None:
                    images.append(found[started][1])
                    head = method.context_head
                    contexts.append(slow_norm(states[place], head.norm) @ head.map.weight.T)
                started += 1
            if token == m.image and method.regression is not None:
                r = method.regression
                guess = slow_norm(states[place - 1], r.norm) @ r.map.weight.T
                regression += float((guess - flat[seen]).square().sum() / WIDTH)
            seen += token == m.image
            if place and token not in (m.image, m.end_of_image) and method.head is not None:
                scores = (slow_norm(states[place - 1], method.head.norm) @ method.head.map.weight.T).double().tolist()
                generation += math.log(sum(math.exp(s) for s in scores)) - scores[token]
                count += 1
    return {
        "generation": generation,
        "count": count,
        "regression": regression,
        "image": torch.stack(images) if images else torch.zeros(0, WIDTH),
        "context": torch.stack(contexts) if contexts else torch.zeros(0, WIDTH),
    }


def slow_contrast(image: Tensor, context: Tensor, scale: float) -> float:
    u, v = (x / x.norm(dim=1, keepdim=True) for x in (image.double(), context.double()))
    total = 0.0
    for logits in (scale * u @ v.T, scale * v @ u.T):
        for k, row in enumerate(logits.tolist()):
            total += math.log(sum(math.exp(x) for x in row)) - row[k]
    return total / (2 * len(u))


@torch.no_grad()
@pytest.mark.parametrize("samples", ["documents", "pairs"])
def test_losses_equal_the_slow_reference(encoder: Encoder, corpus: Corpus, samples: Samples) -> None:
    pairs = [document(i, text) for i, text in enumerate(("two dogs", "a sofa", "a red house by the sea", "a lamp"))]
    method = build(encoder, corpus, samples)
    batch = batch_of(method, DOCUMENTS if samples == "documents" else pairs)
    out, expected = method.embed(batch, key(0, 0)), slow(method, batch)
    assert out.local["generation"].item() == pytest.approx(expected["generation"], rel=1e-4)
    assert {name: n.item() for name, n in method.counts(batch).items()} == {"generation": expected["count"]}
    assert out.shared.keys() == {"image", "context"}
    for name, rows in out.shared.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-3, atol=1e-5)
    assert len(expected["image"]) == (5 if samples == "documents" else 2)
    loss = method.loss(out.shared)["contrastive"].item()
    assert loss == pytest.approx(slow_contrast(expected["image"], expected["context"], 1 / 0.07), rel=1e-4)
    assert method.weights() == {"generation": 1.0, "contrastive": 0.1}


@torch.no_grad()
def test_regression_equals_the_slow_reference(encoder: Encoder, corpus: Corpus) -> None:
    lcl = build(encoder, corpus)
    method = build(encoder, corpus, objective="generation_regression")
    batch = batch_of(method, DOCUMENTS)
    method.project.attention = lcl.project.attention  # which the reference pools with; it is not looked at here
    local, expected = method.embed(batch, key(0, 0)).local, slow(method, batch)
    assert local["regression"].item() == pytest.approx(expected["regression"], rel=1e-4)
    assert local["generation"].item() == pytest.approx(expected["generation"], rel=1e-4)
    assert method.counts(batch)["regression"].item() == 5 * 16
    assert method.weights() == {"generation": 1.0, "regression": 1.0}


def test_the_latents_are_pulled_to_what_predicts_them(encoder: Encoder, corpus: Corpus) -> None:
    """Nothing stops the gradient of the regression's target, as in the objective that LCL is compared with."""
    method = build(encoder, corpus, objective="generation_regression", regression_weight=2.0)
    batch = batch_of(method, DOCUMENTS)
    optimizer = torch.optim.SGD(method.project.parameters(), lr=0.3)
    spread = []
    for _ in range(60):
        latents = method.project(method.encoder(method.encoder.normalize(batch["image"][:, 0])).patches)[0]
        spread.append(latents.std(dim=(0, 1)).mean().item())
        optimizer.zero_grad()
        (method.embed(batch, key(0, 0)).local["regression"] / (5 * 16)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert spread[-1] < 0.7 * spread[0]
    assert method.weights() == {"generation": 1.0, "regression": 2.0}


# What sees what.


@torch.no_grad()
def contexts(method: LCL, *parts: str | int) -> Tensor:
    return embed(method, [document(*parts)]).shared["context"]


def test_a_context_knows_all_before_its_picture_and_nothing_else(method: LCL) -> None:
    usual = contexts(method, "two dogs", 1, "a red house", 2, "by the sea")
    assert len(usual) == 2 and not torch.allclose(usual[0], usual[1])
    # Text behind a picture, and the picture itself.
    assert torch.equal(contexts(method, "two dogs", 1, "a red house", 2, "a lamp")[1], usual[1])
    assert torch.equal(contexts(method, "two dogs", 1, "a red house", 9, "by the sea")[1], usual[1])
    assert torch.allclose(contexts(method, "two dogs", 9, "a lamp and a sofa", 9)[0], usual[0], atol=1e-6)
    # An earlier picture, and an earlier text.
    assert not torch.allclose(contexts(method, "two dogs", 9, "a red house", 2, "by the sea")[1], usual[1])
    assert not torch.allclose(contexts(method, "a lamp", 1, "a red house", 2, "by the sea")[0], usual[0])


def test_pictures_and_their_contexts_are_in_the_same_order(method: LCL) -> None:
    with torch.no_grad():
        whole = embed(method, DOCUMENTS).shared
        batch = batch_of(method, DOCUMENTS)
        pictures = [batch["image"][row, : batch["images"][row]] for row in range(3)]
        alone = [method.embed_image(method.encoder(method.encoder.normalize(p))) for p in pictures]
    torch.testing.assert_close(whole["image"], torch.cat(alone), rtol=1e-4, atol=1e-6)
    assert batch["images"].tolist() == [2, 2, 1]


def test_generation_reaches_the_encoder_and_contrast_earlier_pictures(method: LCL) -> None:
    def pull(loss: Tensor) -> Tensor:
        method.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grad = method.encoder.backbone.patch_embed.proj.weight.grad
        return torch.zeros(()) if grad is None else grad.abs().sum()

    assert pull(embed(method, [document("two dogs", 1, "a lamp")]).local["generation"]) > 0
    # All that the second context can tell the encoder comes by way of the first picture.
    assert pull(embed(method, [document("two dogs", 1, "a lamp", 2)]).shared["context"][1].square().sum()) > 0
    assert pull(embed(method, [document("two dogs", 1, "a lamp", 2)]).shared["context"][0].square().sum()) == 0


@pytest.mark.parametrize(("first", "rows"), [(1.0, 0), (0.0, 1)])
def test_a_picture_with_nothing_before_it_has_no_contrast(
    encoder: Encoder, corpus: Corpus, first: float, rows: int
) -> None:
    method = build(encoder, corpus, "pairs", image_first=first)
    batch = batch_of(method, [document(1, "two dogs")])
    one, two = words(corpus, "two dogs")
    tokenizer, m = corpus.need_tokenizer("tests"), method.markers
    expected = {1.0: [one, two, tokenizer.end], 0.0: [one, two, m.start_of_image]}[first]
    targets = text_targets(batch["text"], batch["length"], m)
    assert batch["text"][:, 1:][targets].tolist() == expected
    shared = method.embed(batch, key(0, 0)).shared
    assert shared["image"].shape == shared["context"].shape == (rows, WIDTH)


def test_without_any_contrast_in_a_batch_the_loss_is_0_and_every_parameter_has_a_gradient(
    encoder: Encoder, corpus: Corpus
) -> None:
    method = build(encoder, corpus, "pairs", image_first=1.0)
    batch = batch_of(method, [document(i, "two dogs and a lamp") for i in range(4)])
    for micro in (0, 2):
        method.zero_grad()
        losses, _ = Accumulator(method, Embed(method), 0, micro)(batch)
        assert losses["contrastive"].item() == 0 and math.isfinite(losses["generation"].item())
        grads = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads.values())


def test_micro_batches_with_and_without_contrast_add_up_to_the_whole(encoder: Encoder, corpus: Corpus) -> None:
    method = build(encoder, corpus, "mixed")
    pairs = [document(i, text) for i, text in enumerate(("two dogs", "a sofa", "a red house", "a lamp"))]
    batch = batch_of(method, [*pairs, *DOCUMENTS])
    gradients = []
    for micro in (0, 1, 3):
        method.zero_grad()
        losses, _ = Accumulator(method, Embed(method), 0, micro)(batch)
        gradients.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None} | losses)
    starts = batch["text"] == method.markers.start_of_image
    rows = (starts[:, 1:]).sum(dim=1).tolist()
    assert 0 in rows and max(rows) == 2  # of a micro-batch of one sample
    for split in gradients[1:]:
        for name, expected in gradients[0].items():
            scale = expected.abs().max().clamp_min(1e-6)
            assert float((split[name] - expected).abs().max() / scale) < 2e-4, name


def test_padding_and_the_length_of_the_batch_change_nothing(encoder: Encoder, corpus: Corpus) -> None:
    short, long = build(encoder, corpus), build(encoder, corpus, sequence=200)
    long.load_state_dict({**short.state_dict(), "language.positional_embedding": torch.zeros(200, WIDTH)})
    with torch.no_grad():
        long.language.positional_embedding[:80] = short.language.positional_embedding
        together = embed(short, DOCUMENTS)
        longer = embed(long, DOCUMENTS)
        batch = batch_of(short, DOCUMENTS)
        alone = [short.embed(batch.part(i, i + 1), key(0, 0)).local["generation"].item() for i in range(3)]
    assert torch.equal(longer.local["generation"], together.local["generation"])
    assert torch.equal(longer.shared["context"], together.shared["context"])
    assert sum(alone) == pytest.approx(together.local["generation"].item(), rel=1e-5)


def test_the_pooled_vector_is_a_weighted_mean_of_what_the_language_model_reads(
    encoder: Encoder, corpus: Corpus
) -> None:
    """With one head the weights are the same in all dimensions, so that they can be found again."""
    one_head = build(encoder, corpus, language=LanguageConfig(WIDTH, 1, 1))
    with torch.no_grad():
        encoded = encoder(encoder.normalize(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)))
        tokens, pooled = one_head.project(encoded.patches)
        assert pooled is not None
        # With 16 tokens in 32 dimensions, only these weights give this vector (the value's bias is in every token).
        found = torch.linalg.lstsq(tokens.double().transpose(1, 2), pooled.double().unsqueeze(2)).solution[..., 0]
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, dtype=torch.double), rtol=0, atol=1e-3)
    assert bool((found > 0).all()) and bool(found.std() > 1e-4)
    torch.testing.assert_close(pooled, one_head.embed_image(encoded))


# Texts beside images.


def test_a_text_is_encoded_as_what_precedes_a_picture(encoder: Encoder, corpus: Corpus) -> None:
    method = build(encoder, corpus, "pairs", image_first=0.0)
    assert method.text is not None and method.text.context == 12
    texts = ["two dogs", "a red house by the sea"]
    ids = method.text.encode(texts)
    m, tokenizer = method.markers, corpus.need_tokenizer("tests")
    for row, text in zip(ids.tolist(), texts, strict=True):
        used = [tokenizer.start, *words(corpus, text), m.start_of_image]
        assert row == used + [tokenizer.pad] * (12 - len(used))
    with torch.no_grad():
        shared = embed(method, [document(i, text) for i, text in enumerate(texts)]).shared
        torch.testing.assert_close(method.text(ids), shared["context"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(method.text(ids[:, :9]), method.text(ids), rtol=1e-4, atol=1e-6)


def test_a_long_text_is_cut_and_still_ends_in_the_start_of_a_picture(method: LCL, corpus: Corpus) -> None:
    assert method.text is not None
    (row,) = method.text.encode(["a red lamp " * 9]).tolist()
    assert row == [corpus.need_tokenizer("tests").start, *words(corpus, "a red lamp " * 9)[:10], row[-1]]
    assert row[-1] == method.markers.start_of_image


def test_only_the_end_of_the_text_is_replaced_where_the_padding_has_its_id(encoder: Encoder, corpus: Corpus) -> None:
    tokenizer = corpus.need_tokenizer("tests")
    like_clip = dataclasses.replace(tokenizer, pad=tokenizer.end)
    method = build(encoder, Corpus(like_clip))
    assert method.text is not None
    (row,) = method.text.encode(["two dogs"]).tolist()
    used = [tokenizer.start, *words(corpus, "two dogs"), method.markers.start_of_image]
    assert row == used + [tokenizer.end] * (12 - len(used))


def test_the_text_encoder_has_no_weights_of_its_own(method: LCL) -> None:
    assert method.text is not None
    assert list(method.text.parameters()) == []
    assert not any(name.startswith("text") for name in method.state_dict())
