"""MUG's captions say what is in the picture: held-out captions are likelier than under a language model of its own.

The language model is MUG with the image taken out of the captions' sight: the same decoder, start, samples and steps,
and zeros where the latent was. About a minute a seed on one free core.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.shapes import Shapes
from altsight.data.views import Crop, random_keep
from altsight.evals.bootstrap import interval
from altsight.losses.captioning import is_text
from altsight.methods.base import Corpus
from altsight.methods.mug import MUG
from altsight.nn.decoder import CaptionDecoderConfig, PixelDecoderConfig
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator, Embed
from tests.behaviour.conftest import prepared_shapes

pytestmark = pytest.mark.slow
TRAIN, HELD_OUT, STEPS, BATCH, RATE = 3000, 600, 600, 64, 3e-3
Floats = npt.NDArray[np.float64]
CONFIG = MUG.Config(
    decoder=PixelDecoderConfig(width=32, depth=1, heads=2),
    captions=CaptionDecoderConfig(
        unimodal_layers=1, multimodal_layers=1, cross_attentions=1, heads=2, head_dim=32, ff_mult=2, length=16
    ),
)
ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=64, depth=2, heads=2)


def batch_of(method: MUG, source: Shapes) -> Batch:
    """Return all samples of `source`, uncropped, each with one mask."""
    prepare = method.prepare(Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False), 32)
    examples = [prepare(source.document(i, key(0, i)), key(0, i)) for i in range(len(source))]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in ("image", "keep", "text")}
    return Batch(tensors, torch.arange(len(source)), torch.arange(len(source)))


def blind(module: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[0], torch.zeros_like(inputs[1])


def train(corpus: Corpus, seed: int, sees: bool) -> MUG:
    """Train with the losses and weights of MUG, a new mask in every step; `sees`: the captions see the image."""
    method = MUG(CONFIG, Encoder(ENCODER), corpus)
    method.init_weights(key(seed, 0, "init"))
    if not sees:
        method.captions.register_forward_pre_hook(blind)
    data, accumulate = batch_of(method, Shapes(TRAIN, seed)), Accumulator(method, Embed(method), seed)
    optimizer = torch.optim.AdamW(method.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.95))
    for step in range(STEPS):
        rows = torch.from_numpy(key(seed, step, "rows").generator().integers(TRAIN, size=BATCH))
        tensors = {name: tensor[rows] for name, tensor in data.tensors.items()}
        tensors["keep"] = torch.stack([random_keep(16, 0.75, key(seed, step * BATCH + i)) for i in range(BATCH)])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 60) * (1 - step / STEPS)
        accumulate(Batch(tensors, torch.arange(BATCH), rows))
        optimizer.step()
        optimizer.zero_grad()
    return method.eval()


@torch.no_grad()
def nats(method: MUG, batch: Batch) -> Floats:
    """Return the negative log-likelihood of every token of all captions (n,)."""
    latent = method.encoder(method.encoder.normalize(batch["image"]), batch["keep"]).tokens
    ids = batch["text"]
    losses = F.cross_entropy(method.captions(ids[:, :-1], latent).transpose(1, 2), ids[:, 1:], reduction="none")
    found: Floats = losses[is_text(ids, method.tokenizer.end)[:, 1:]].double().numpy()
    return found


@functools.cache
def measured(seed: int) -> tuple[Floats, Floats, Floats, npt.NDArray[np.int64]]:
    """Return the nats of held-out tokens under MUG, MUG with another's image and the language model; their captions."""
    data = prepared_shapes(Path("shapes"), 500, seed)
    corpus = Corpus(data.tokenizer)
    mug, language = train(corpus, seed, sees=True), train(corpus, seed, sees=False)
    test = batch_of(mug, Shapes(HELD_OUT, 1000 + seed))
    swapped = {name: t if name == "text" else t.roll(1, dims=0) for name, t in test.tensors.items()}
    other = nats(mug, Batch(swapped, test.positions, test.samples))
    caption = is_text(test["text"], mug.tokenizer.end)[:, 1:].nonzero()[:, 0].numpy()
    return nats(mug, test), other, nats(language, test), caption


@pytest.mark.parametrize("seed", [0, 1])
def test_mug_beats_its_own_language_model_on_held_out_captions(seed: int) -> None:
    mug, _, language, caption = measured(seed)
    saved = interval(language - mug, caption)
    print(
        f"seed {seed}: perplexity {np.exp(mug.mean()):.3f} with, {np.exp(language.mean()):.3f} without the image;",
        end=" ",
    )
    print(f"{saved.value:.3f} nats a token [{saved.low:.3f}, {saved.high:.3f}]")
    assert saved.low > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_wrong_image_makes_captions_less_likely(seed: int) -> None:
    mug, other, language, caption = measured(seed)
    lost = interval(other - mug, caption)
    print(f"seed {seed}: another's image costs {lost.value:.3f} nats a token [{lost.low:.3f}, {lost.high:.3f}]")
    assert lost.low > 0
    assert interval(other - language, caption).low > 0, "an image that misleads is worse than none"
