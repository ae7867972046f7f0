"""Fine-tuning against the linear probe: a small CLIP that has seen made-up shapes alone, on groups of emoji."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from altsight.core.config import OptimConfig
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.views import Crop
from altsight.evals import evaluate
from altsight.evals.base import Result, Split, Task
from altsight.evals.bootstrap import Interval, hits_of, paired_difference
from altsight.transfer.augment import Augment, Mixing
from altsight.transfer.base import FitConfig
from altsight.transfer.finetune import Finetune
from tests.toy import toy_clip

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
SETS = {split: f"samples:emoji/{split}" for split in ("train", "val", "test")}
TUNE = Finetune(
    SETS["train"],
    SETS["test"],
    label="group",
    crop_ratio=1.0,
    drop_path=0.0,
    augment=Augment(Crop(scale=(0.35, 1.0)), rand_augment="", erase=0.0),
    mixing=Mixing(0.0, 0.0),
    optim=OptimConfig(lr=1e-3, lr_base_batch=0, betas=(0.9, 0.999), warmup_fraction=0.1, layer_decay=0.75, min_lr=1e-6),
    fit=FitConfig(epochs=20, batch=64, workers=0, precision="fp32"),
)
"""A small network under a small budget: without the recipe's strong augmentation, which costs it accuracy here."""


def tuned(folder: Path, seed: int) -> Result:
    """Return the top-1 accuracy of one fine-tuning; a folder that was trained in before is only scored again."""
    tune = dataclasses.replace(TUNE, fit=dataclasses.replace(TUNE.fit, seed=seed))
    return tune(toy_clip(), folder / str(seed))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the seeds are trained."""
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def probe() -> Result:
    """The linear probe by L-BFGS, which is fitted to the validation images as well."""
    train, val, test = (Split(name, read_pairs(locate(source), (), "group")) for name, source in SETS.items())
    (result,) = evaluate(toy_clip(), [Task("emoji", train, val, test, label="group")], ["linear"])
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_learns(folder: Path, probe: Result, seed: int) -> None:
    result = tuned(folder, seed)
    found = paired_difference(hits_of(result), hits_of(probe))
    print(f"\nseed {seed}: fine-tuned {shown(result)}, linear probe {shown(probe)}, difference {shown(found)}")
    assert result.n == probe.n and result.low is not None
    assert result.low > probe.extra["commonest"]


def test_fine_tuning_beats_the_linear_probe(folder: Path, probe: Result) -> None:
    hits = np.mean([hits_of(tuned(folder, seed)) for seed in SEEDS], axis=0)
    found = paired_difference(hits, hits_of(probe))
    print(f"\nmean of {len(SEEDS)} seeds: fine-tuned {hits.mean():.3f}, difference {shown(found)}")
    assert found.low > 0


def shown(found: Result | Interval) -> str:
    """Return a value and its interval in words."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
