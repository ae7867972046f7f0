"""Every method learns on the sample data: its loss falls, and a probe of its features beats chance."""

from __future__ import annotations

from pathlib import Path

import altsight_samples
import pytest

from altsight.data.prepare import read_pairs
from altsight.data.prepared import Prepared
from altsight.evals import evaluate
from altsight.evals.base import Split, Task
from altsight.evals.load import load_view
from altsight.methods import METHODS
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from tests.contract.tiny import tiny_run

LEAST = {"simsiam": -1.0}
"""Least value that a loss can have, where it is not 0. Targets that spread over prototypes raise it from step to step
(DINO, iBOT, DINOv2): those methods log it as `floor`."""


def emoji_task() -> Task:
    """The embedded emoji, classified by group."""
    splits = [Split(name, read_pairs(str(altsight_samples.path("emoji", name)))) for name in ("train", "val", "test")]
    return Task("emoji", *splits, label="group")


@pytest.mark.parametrize("name", METHODS)
def test_learns(name: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run(name, sample_data.directory, samples=64 * 60, batch=64)
    pretrain(run, sample_data, tmp_path)
    least = LEAST.get(name, 0.0)
    losses = [line["loss"] - line.get("floor", least) for line in read_log(tmp_path) if "loss" in line]
    start, end = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert end < 0.97 * start, f"the loss above its least value went from {start:.3f} to {end:.3f}"
    results = evaluate(load_view(tmp_path), [emoji_task()], ["knn"])
    best = next(r for r in results if r.value is not None)
    assert best.low is not None and best.chance is not None and best.low > best.chance
