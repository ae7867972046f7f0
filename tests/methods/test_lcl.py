"""LCL: what its language model sees, its losses against loops, its contexts and sizes, documents it learns from."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altsight_samples
import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Image, Outputs, Progress, Text
from altsight.data.loader import Loader
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared
from altsight.data.sequence import Markers
from altsight.data.sources import Interleaves
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.latent import text_targets
from altsight.methods.base import Corpus, Samples
from altsight.methods.lcl import LCL
from altsight.methods.sequences import SequencePrepare
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.interleaved import LanguageConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.optim import make_optimizer
from altsight.train.run import DataConfig, Run, TrainConfig
from tests.contract.tiny import tiny_run

WIDTH, HEADS = 32, 2
CONFIG = LCL.Config(LanguageConfig(WIDTH, HEADS, layers=2), sequence=80, max_images=3, context=12)
OBJECTIVES = ("lcl", "generation", "generation_regression", "contrastive")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def document(*parts: str | int | bytes) -> Document:
    """Return a document of texts, and of pictures by their seeds or their bytes."""
    made = [Text(p) if isinstance(p, str) else Image(picture(p) if isinstance(p, int) else p) for p in parts]
    return Document(tuple(made), "made")


DOCUMENTS = (
    document("two dogs", 1, "a red house", 2, "by the sea"),
    document(3, "a green sofa", 4),
    document("a red lamp by the sofa", 5),
)


def build(encoder: Encoder, corpus: Corpus, samples: Samples = "documents", **settings: Any) -> LCL:
    method = LCL(dataclasses.replace(CONFIG, **settings), encoder, dataclasses.replace(corpus, samples=samples))
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> LCL:
    return build(encoder, corpus)


def batch_of(method: LCL, documents: Sequence[Document]) -> Batch:
    examples = [method.prepare(Crop(), 32)(d, key(0, position)) for position, d in enumerate(documents)]
    assert all(example is not None for example in examples)
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in examples[0] or {}}
    return Batch(tensors, torch.arange(len(examples)), torch.arange(len(examples)))


def embed(method: LCL, documents: Sequence[Document]) -> Outputs:
    return method.embed(batch_of(method, documents), key(0, 0))


def words(corpus: Corpus, text: str) -> list[int]:
    tokenizer = corpus.need_tokenizer("tests")
    return tokenizer.encode(text, tokenizer.count(text)).tolist()[1:-1]


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


# Objectives, size, optimizer.


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("micro", [0, 1])
def test_an_objective_has_its_losses_and_no_parameter_without_a_gradient(
    encoder: Encoder, corpus: Corpus, objective: Any, micro: int
) -> None:
    method = build(encoder, corpus, objective=objective)
    losses, counts = Accumulator(method, Embed(method), 0, micro)(batch_of(method, DOCUMENTS))
    expected = {
        "lcl": {"generation", "contrastive"},
        "generation": {"generation"},
        "generation_regression": {"generation", "regression"},
        "contrastive": {"contrastive"},
    }[objective]
    assert losses.keys() == method.weights().keys() == expected
    assert counts.keys() == expected - {"contrastive"}
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    contrasts = "contrastive" in expected
    assert method.shares is contrasts and (method.text is not None) is contrasts
    assert method.report().keys() == ({"scale"} if contrasts else set())
    method.after_step(Progress(0, 1))
    parts = {name.split(".")[0] for name, _ in method.named_parameters()}
    assert parts == {"encoder", "language", "project"} | {
        name for name, loss in (("head", "generation"), ("regression", "regression")) if loss in expected
    } | ({"context_head", "logit_scale"} if contrasts else set())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_objectives_start_from_the_same_weights(encoder: Encoder, corpus: Corpus, objective: Any) -> None:
    lcl = build(encoder, corpus).state_dict()
    other = build(encoder, corpus, objective=objective).state_dict()
    # The pooling draws from the same key behind the maps that all have.
    assert all(torch.equal(value, lcl[name]) for name, value in other.items() if name in lcl)


def test_weights_start_as_in_clips_text_tower_with_a_query_of_unit_variance(encoder: Encoder, corpus: Corpus) -> None:
    width = 128
    method = build(encoder, corpus, language=LanguageConfig(width, 2, 2), sequence=200)
    attention, block = method.project.attention, method.language.blocks[1]
    assert attention is not None and method.context_head is not None
    residual = (2 * 2 * width) ** -0.5
    for tensor, std in (
        (method.language.token_embedding.weight, 0.02),
        (method.language.positional_embedding, 0.01),
        (block.attn.qkv.weight, width**-0.5),
        (block.attn.proj.weight, residual),
        (block.mlp.fc1.weight, (2 * width) ** -0.5),
        (block.mlp.fc2.weight, residual),
        (method.context_head.map.weight, width**-0.5),
        (attention.query, 1.0),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.05 if len(tensor) > 1 else 0.5)
        assert abs(tensor.mean().item()) < 4 * std / tensor.numel() ** 0.5


def test_losses_at_the_start_are_those_of_guessing(encoder: Encoder, corpus: Corpus) -> None:
    method = build(encoder, corpus, "pairs", image_first=0.0)
    batch = batch_of(method, [document(i, "two dogs") for i in range(64)])
    with torch.no_grad():
        out = method.embed(batch, key(0, 0))
        generation = (out.local["generation"] / method.counts(batch)["generation"]).item()
        contrast = method.loss(out.shared)["contrastive"].item()
    guess = math.log(corpus.need_tokenizer("tests").vocab_size + 3)
    assert guess - 0.1 < generation < guess + 0.4  # the default initialisation of the output map costs about 0.2
    # All contexts are alike here, so that no picture can be told from another by them.
    assert contrast == pytest.approx(math.log(64), abs=0.5)
    assert method.report()["scale"] == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("direction", [1, -1])
def test_scale_stays_between_1_and_100(method: LCL, direction: int) -> None:
    assert method.logit_scale is not None
    with torch.no_grad():
        for step in range(10):
            method.logit_scale += direction
            method.after_step(Progress(step, 10))
            assert 0 <= method.logit_scale <= math.log(100) + 1e-6
    assert method.report()["scale"] == pytest.approx(100 if direction > 0 else 1, rel=1e-5)


def test_decay_groups(corpus: Corpus) -> None:
    config = EncoderConfig(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2, registers=1, positions="learned"
    )
    method = build(Encoder(config), corpus)
    groups = make_optimizer(method, LCL.optim, 64).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in decayed}
    assert {"encoder.backbone.pos_embed", "language.positional_embedding", "project.attention.query"} <= names
    exempt = {name for name, p in method.named_parameters() if p.ndim > 1} - names
    assert exempt == {"encoder.backbone.cls_token", "encoder.backbone.reg_token"}
    assert all(p.ndim > 1 for name, p in method.named_parameters() if name in names)
    assert "logit_scale" not in names


SIZES = [
    ("vit_base_patch16_clip_quickgelu_224", LanguageConfig(), 280, (85.80, 123.81, 2.37, 37.95, 249.92)),
    ("vit_base_patch32_clip_quickgelu_224", LanguageConfig(512, 8), 128, (87.46, 63.46, 1.45, 25.30, 177.66)),
    ("vit_base_patch32_clip_quickgelu_224", LanguageConfig(512, 8), 2048, (87.46, 64.44, 1.45, 25.30, 178.64)),
]


@pytest.mark.parametrize(("model", "language", "sequence", "millions"), SIZES)
def test_lcl_b_has_the_published_size(
    model: str, language: LanguageConfig, sequence: int, millions: tuple[float, ...]
) -> None:
    vocabulary = {"<|startoftext|>": 49406, "<|endoftext|>": 49407} | {f"w{i}": i for i in range(49406)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w0")), pad=0, start=49406, end=49407)
    encoder = EncoderConfig(model, positions="learned", pre_norm=True, quick_gelu=True)
    with torch.device("meta"):
        method = LCL(LCL.Config(language, sequence=sequence), Encoder(encoder), Corpus(tokenizer))
    assert method.language.token_embedding.num_embeddings == 49_411
    assert method.context_head is not None and method.head is not None
    parts = (method.encoder, (method.language, method.context_head), method.project, method.head)
    counted = [
        sum(p.numel() for module in (part if isinstance(part, tuple) else (part,)) for p in module.parameters())
        for part in parts
    ]
    counted.append(sum(p.numel() for p in method.parameters()))
    assert tuple(round(count / 1e6, 2) for count in counted) == millions
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in method.modules())
    assert all(isinstance(block.mlp.act, torch.nn.GELU) for block in method.language.blocks)


# Preparation.


def test_a_document_is_one_sequence_with_its_pictures(method: LCL, corpus: Corpus) -> None:
    prepare_, at = method.prepare(Crop(), 32), key(0, 5)
    example = pickle.loads(pickle.dumps(prepare_))(document("two dogs", 1, "a sofa", 2), at)
    assert example is not None
    tokenizer, picture_ids = corpus.need_tokenizer("tests"), method.markers.picture(16)
    used = [tokenizer.start, *words(corpus, "two dogs"), *picture_ids, *words(corpus, "a sofa"), *picture_ids]
    used.append(tokenizer.end)
    assert example["text"].tolist() == used + [tokenizer.pad] * (80 - len(used))
    assert (example["length"].item(), example["images"].item()) == (len(used), 2)
    assert example["image"].shape == (3, 3, 32, 32) and example["image"].dtype == torch.uint8
    assert not example["image"][2].any()
    again = prepare_(document("two dogs", 1, "a sofa", 1), at)
    assert again is not None and not torch.equal(again["image"][0], again["image"][1])  # a crop for each picture


def test_pictures_beyond_the_most_and_broken_ones_are_left_out(method: LCL) -> None:
    prepare_ = method.prepare(Crop(), 32)

    def count(*parts: str | int | bytes) -> tuple[int, int] | None:
        example = prepare_(document(*parts), key(0, 0))
        if example is None:
            return None
        starts = int((example["text"] == method.markers.start_of_image).sum())
        assert bool(example["image"][:starts].flatten(1).any(dim=1).all()) and not example["image"][starts:].any()
        return starts, int(example["images"])

    assert count("a", 1, "b", 2, 3, 4, "c") == (3, 3)
    assert count("a", 1, b"no image", 2, 3, "c") == (2, 2)  # the first three, of which one is broken
    assert count("a", b"no image", "b", 1) == (1, 1)
    assert count("a", b"no image") is None
    # 80 tokens have room for four pictures of 18, but not with this much text before the second one.
    assert count("a", 1, "a red house by the sea " * 9, 2) == (1, 1)
    assert count("a red house by the sea " * 12, 1) is None
    assert prepare_(document(1, 2), key(0, 0)) is None and prepare_(document("a"), key(0, 0)) is None


def test_a_pair_is_cut_like_that_of_every_other_method_and_stands_on_either_side(
    encoder: Encoder, corpus: Corpus
) -> None:
    method = build(encoder, corpus, "pairs")
    prepare_, first = method.prepare(Crop(), 32), 0
    for position in range(200):
        at = key(0, position)
        example = prepare_(document(1, "two dogs"), at)
        assert example is not None and example["image"].shape == (1, 3, 32, 32)
        assert position or torch.equal(example["image"][0], Crop()(picture(1), 32, at))
        first += int(example["text"][0] == method.markers.start_of_image)
    assert 75 < first < 125
    assert prepare_(document(1), key(0, 0)) is None


@pytest.mark.parametrize(
    ("samples", "data", "parts", "pair"),
    [
        ("pairs", "auto", (1, "a"), True),
        ("documents", "auto", (1, "a"), False),
        ("mixed", "auto", (1, "a"), True),
        ("mixed", "auto", ("a", 1), False),
        ("mixed", "auto", (1, "a", 2), False),
        ("mixed", "interleaved", (1, "a"), True),
        ("unknown", "auto", (1, "a"), True),
        ("unknown", "auto", (1, "a", "b"), False),
        ("unknown", "paired", (1, "a", 2, "b"), True),
    ],
)
def test_every_sample_is_read_as_what_it_is(
    encoder: Encoder, corpus: Corpus, samples: Samples, data: Any, parts: tuple[str | int, ...], pair: bool
) -> None:
    method = build(encoder, corpus, samples, data=data)
    prepare_ = method.prepare(Crop(), 32)
    starts = set()
    for position in range(20):
        example = prepare_(document(*parts), key(0, position))
        assert example is not None
        starts.add(int(example["text"][0]))
    both = {method.tokenizer.start, method.markers.start_of_image}
    assert starts == (both if pair else {method.tokenizer.start})
    only_pairs = samples == "pairs" or data == "paired"
    assert example["image"].shape[0] == (1 if only_pairs else 3)


@pytest.mark.parametrize("spectrum", [False, True])
def test_small_pictures_of_a_curriculum_have_fewer_tokens(method: LCL, spectrum: bool) -> None:
    made = method.prepare(Crop(), 16)
    assert isinstance(made, SequencePrepare)
    if spectrum:  # full-size pictures, of which the encoder takes the low frequencies
        made = dataclasses.replace(made, size=32)
        method.encoder.input_size = 16
    example = made(DOCUMENTS[0], key(0, 0))
    assert example is not None
    batch = Batch({name: value[None] for name, value in example.items()}, torch.arange(1), torch.arange(1))
    assert int((batch["text"] == method.markers.image).sum()) == 2 * 4
    assert method.embed(batch, key(0, 0)).shared["image"].shape == (2, WIDTH)


# Errors.


def test_documents_are_asked_for_and_pairs_given(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="needs documents, and the data set has only image-text pairs"):
        build(encoder, corpus, "pairs", data="interleaved")
    for samples in ("documents", "mixed"):
        with pytest.raises(UserError, match="needs image-text pairs, and the data set has interleaved documents"):
            build(encoder, corpus, samples, data="paired")
    for samples in ("documents", "mixed", "unknown"):
        build(encoder, corpus, samples, data="interleaved")


def test_pairs_are_refused_before_the_first_step(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("lcl", sample_data.directory, 64)
    run = dataclasses.replace(run, method=dataclasses.replace(run.method, data="interleaved"))
    with pytest.raises(UserError, match="prepare documents"):
        pretrain(run, sample_data, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_what_does_not_fit_is_refused(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"--method.sequence 20 or more"):
        build(encoder, corpus, sequence=19)
    build(encoder, corpus, sequence=20)
    with pytest.raises(UserError, match="not divisible by its 3 heads"):
        build(encoder, corpus, language=LanguageConfig(32, 3, 1))
    with pytest.raises(UserError, match="lcl learns from text"):
        LCL(CONFIG, encoder, Corpus())


# Real documents.


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The embedded interleaved documents."""
    out = tmp_path_factory.mktemp("documents") / "out"
    return prepare(PrepareConfig(str(altsight_samples.documents()), out, vocab_size=1024))


def test_the_corpus_knows_what_its_samples_are(documents: Prepared, sample_data: Prepared) -> None:
    source = documents.source
    assert isinstance(source, Interleaves)
    as_pairs = dataclasses.replace(source, as_pairs=True)

    def kind(*sources: Any) -> Samples:
        mixed = sources[0] if len(sources) == 1 else Mixture(sources, (1.0,) * len(sources))
        return Corpus.of(dataclasses.replace(documents, source=mixed)).samples

    assert kind(source) == kind(source, source) == "documents"
    assert kind(sample_data.source) == kind(as_pairs) == kind(as_pairs, sample_data.source) == "pairs"
    assert kind(source, sample_data.source) == kind(source, as_pairs) == "mixed"
    corpus = Corpus.of(sample_data)
    assert (corpus.tokenizer, corpus.classes) == (sample_data.tokenizer, sample_data.classes)


def test_learns_from_real_documents(documents: Prepared, tmp_path: Path) -> None:
    run = Run(
        name="lcl",
        method=LCL.Config(LanguageConfig(32, 2, 1), data="interleaved", sequence=400),
        optim=OptimConfig(lr=3e-3, lr_base_batch=0, warmup_fraction=0.1),
        encoder=EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2),
        # One document in five has its first picture behind so many tokens.
        data=DataConfig(str(documents.directory), Crop(scale=(0.9, 1.0), flip=False), workers=0, max_bad_fraction=0.5),
        train=TrainConfig(samples=8 * 30, batch=8, precision="fp32", device="cpu", log_every=1),
    )
    pretrain(run, documents, tmp_path)
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    for name in ("generation", "contrastive"):
        values = [line[f"loss/{name}"] for line in lines]
        start, end = sum(values[:5]) / 5, sum(values[-5:]) / 5
        assert end < 0.97 * start, f"{name} went from {start:.3f} to {end:.3f}"


def test_pairs_and_documents_in_one_run(documents: Prepared, sample_data: Prepared) -> None:
    source = Mixture((sample_data.source, documents.source), (1.0, 1.0), sample_data.classes)
    mixed = dataclasses.replace(documents, source=source)
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2))
    method = build(encoder, Corpus.of(mixed), "mixed", sequence=1024)
    loader = Loader(source, source.order(0), method.prepare(Crop(), 32), 16)
    batch, _ = next(loader.batches(World(), 0, 16))
    assert batch["image"].shape == (16, 3, 3, 32, 32)
    kinds = [source.locate(i)[0] is documents.source for i in batch.samples.tolist()]
    assert 0 < sum(kinds) < 16
    for whole, row, length in zip(kinds, batch["text"].tolist(), batch["length"].tolist(), strict=True):
        last = row[length - 1]
        if whole:
            assert (row[0], last) == (method.tokenizer.start, method.tokenizer.end)
        else:
            assert (row[0] == method.tokenizer.start) is (last == method.markers.end_of_image)
    losses, _ = Accumulator(method, Embed(method), 0)(batch)
    assert all(math.isfinite(float(loss)) for loss in losses.values())


def test_markers_are_behind_the_vocabulary(method: LCL, corpus: Corpus) -> None:
    tokenizer = corpus.need_tokenizer("tests")
    assert method.markers == Markers.after(tokenizer)
    assert method.language.token_embedding.num_embeddings == tokenizer.vocab_size + 3
    assert method.head is not None and method.head.map.out_features == tokenizer.vocab_size + 3
