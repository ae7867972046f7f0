"""VirTex: captions in both directions teach the encoder more than captions in one, and these more than nothing.

Two runs of 800 steps on made-up pictures, four to five minutes on a core of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.photometric import Photometric
from altsight.data.views import Crop
from altsight.evals.base import Result
from altsight.evals.bootstrap import hits_of, paired_difference
from altsight.evals.load import view_of
from altsight.methods.base import Corpus
from altsight.methods.virtex import VirTex
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.virtex import TextualHeadConfig
from altsight.train.accumulate import Accumulator, Embed
from tests.behaviour.conftest import prepared_shapes, probe, shapes_task

pytestmark = pytest.mark.slow
PAIRS, STEPS, BATCH, RATE, SEED = 4000, 800, 64, 2e-3, 0
HEAD = TextualHeadConfig(width=96, heads=3, length=16, dropout=0.0)
ENCODER = EncoderConfig("test_resnet", img_size=64)
"""A ResNet of half a million parameters; of 64 pixels it makes a grid of 2 x 2."""


def train(task: Any, steps: int) -> VirTex:
    """Train with AdamW on pictures as they are: no crops, flips or colours, so both tasks learn in a few epochs."""
    data = prepared_shapes(Path("shapes"), PAIRS, SEED)
    config = VirTex.Config(task=task, head=HEAD, colour=Photometric(jitter=0.0, grey=0.0, blur=0.0))
    method = VirTex(config, Encoder(ENCODER), Corpus(data.tokenizer))
    method.init_weights(key(SEED, 0, "init"))
    prepare = method.prepare(Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False), 64)
    examples = [prepare(data.source.document(i, key(0, i)), key(0, i)) for i in range(PAIRS if steps else 0)]
    accumulate = Accumulator(method, Embed(method), SEED)
    optimizer = torch.optim.AdamW(method.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        rows = torch.from_numpy(key(SEED, step, "rows").generator().integers(PAIRS, size=BATCH))
        chosen = [e for i in rows.tolist() if (e := examples[i]) is not None]
        tensors = {name: torch.stack([e[name] for e in chosen]) for name in chosen[0]}
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        accumulate(Batch(tensors, torch.arange(BATCH), rows))
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return method.eval()


@functools.cache
def probed(task: str, steps: int) -> Result:
    """Return the linear probe of 20 classes on 1,000 pictures that nothing was trained on."""
    result = probe(view_of(train(task, steps), "virtex"), shapes_task(train=1000, val=300, test=1000))
    print(f"{task}, {steps} steps: {result.value:.3f} [{result.low:.3f}, {result.high:.3f}]")
    return result


def test_forward_captions_beat_no_training() -> None:
    untrained, forward = probed("captioning", 0), probed("captioning", STEPS)
    assert paired_difference(hits_of(forward), hits_of(untrained)).low > 0


def test_captions_in_both_directions_beat_forward_ones() -> None:
    forward, both = probed("captioning", STEPS), probed("bicaptioning", STEPS)
    assert paired_difference(hits_of(both), hits_of(forward)).low > 0
