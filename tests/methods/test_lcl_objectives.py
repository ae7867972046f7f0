"""LCL: its objectives and their losses, how its weights start, what decays, and the published sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models

from altsight.core.rng import key
from altsight.core.types import Progress
from altsight.data.text import Tokenizer
from altsight.methods.base import Corpus
from altsight.methods.lcl import LCL
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.interleaved import LanguageConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.optim import make_optimizer
from tests.methods.made_documents import (
    DOCUMENTS,
    OBJECTIVES,
    batch_of,
    build,
    document,
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> LCL:
    return build(encoder, corpus)


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
