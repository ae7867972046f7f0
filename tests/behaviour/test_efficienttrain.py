"""EfficientTrain++ earns its place: more accuracy for the same compute (specification 3.9)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from altsight.core.config import OptimConfig
from altsight.data.views import Crop
from altsight.evals.load import load_view
from altsight.methods.base import Corpus
from altsight.methods.supervised import Supervised
from altsight.nn.encoder import EncoderConfig
from altsight.train.curriculum import AccelerateConfig, make_curriculum
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig, build
from tests.behaviour.conftest import prepared_shapes, probe, shapes_task

pytestmark = pytest.mark.slow
STEPS, BATCH = 300, 64
"""Of the run at full size."""


def small_run(samples: int) -> Run[Supervised.Config]:
    """Return a run of a ViT with 8 x 8 patches and 0.1 M parameters; nothing is flipped, since sides are named."""
    return Run(
        "supervised",
        Supervised.Config(),
        OptimConfig(lr=2e-3, lr_base_batch=0, betas=(0.9, 0.999), warmup_fraction=0.1),
        EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=4, width=48, depth=3, heads=3),
        DataConfig(crop=Crop(scale=(0.8, 1.0), ratio=(1, 1), flip=False), workers=0),
        TrainConfig(samples=samples, batch=BATCH, precision="fp32", device="cpu"),
    )


def test_a_curriculum_of_sizes_beats_full_size_at_equal_compute(tmp_path: Path) -> None:
    """Twelve, 24 and 32 pixels in 20, 40 and 40 % of the compute, against 32 all along.

    Without RandAugment, so that the sizes alone make the difference.
    """
    data, task = prepared_shapes(tmp_path, 4000), shapes_task()
    plain = small_run(STEPS * BATCH)
    quick = dataclasses.replace(plain, accelerate=AccelerateConfig("efficienttrain++", augment=False))
    method = build(plain, Corpus.of(data))
    share = make_curriculum(quick.accelerate, method, "supervised", STEPS, BATCH).relative_compute
    more = dataclasses.replace(quick.train, samples=round(STEPS / share) * BATCH)
    quick = dataclasses.replace(quick, train=more)
    curriculum = make_curriculum(quick.accelerate, method, "supervised", quick.steps, BATCH)
    assert [s.size for s in curriculum.stages] == [12] * 2 + [24] * 4 + [32] * 4
    assert curriculum.compute(quick.steps) == pytest.approx(STEPS, rel=0.01)
    accuracy, cost = {}, {}
    for name, run in (("plain", plain), ("quick", quick)):
        cost[name] = pretrain(run, data, tmp_path / name).flops
        accuracy[name] = probe(load_view(tmp_path / name), task)
        print(name, run.steps, "steps", f"{cost[name]:.4g} FLOPs", accuracy[name].value)
    # The encoder's own count: attention and the few other tokens make it a little less than the ledger's.
    assert cost["quick"] == pytest.approx(cost["plain"], rel=0.1)
    assert (accuracy["quick"].value or 0) >= (accuracy["plain"].value or 1) + 0.1
    assert (accuracy["quick"].low or 0) > (accuracy["plain"].high or 1)
