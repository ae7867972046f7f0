"""Hand-made studies: facts and results as a run would have left them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from altsight.core.config import to_dict
from altsight.evals.base import Result
from altsight.evals.bootstrap import interval
from altsight.nn.encoder import EncoderConfig
from altsight.study.plan import Budget, Plan
from altsight.study.result import Arm, Kind, StudyResult
from altsight.study.tasks import TaskConfig
from altsight.train.run import DataConfig, TrainConfig
from altsight.train.state import Summary

TASK = TaskConfig("pets", "train", "val", "test", label="class")
ITEMS = 400


def plan(**changes: Any) -> Plan:
    """Return a plan of mae, clip and the supervised reference, without data behind it."""
    base = Plan(
        name="made by hand",
        methods=("mae", "clip"),
        references=("supervised",),
        budget=Budget(samples=640),
        tasks=(TASK,),
        data=DataConfig("prepared"),
        encoder=EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2),
        train=TrainConfig(batch=64),
    )
    return dataclasses.replace(base, **changes)


def accuracy(hits: np.ndarray, metric: str = "top1", evaluator: str = "knn", **fields: Any) -> Result:
    """Return an accuracy with its interval and packed hits."""
    import base64

    found = interval(hits)
    packed = base64.b64encode(np.packbits(hits.astype(bool)).tobytes()).decode()
    values: dict[str, Any] = {"n": len(hits), "data": "d0d0", "preprocess": "p0p0", "feature_point": "mean"}
    extra = {"hits": packed, **fields.pop("extra", {})}
    return Result("pets", evaluator, metric, found.value, found.low, found.high, 0.1, extra=extra, **(values | fields))


def hits(right: int, first: int = 0, items: int = ITEMS) -> np.ndarray:
    """Return `items` answers of which those from `first` on, `right` of them, are right."""
    return (np.arange(items) >= first) & (np.arange(items) < first + right)


def absent(metric: str = "top1", evaluator: str = "zeroshot") -> Result:
    """Return a result that does not apply."""
    return Result("pets", evaluator, metric, None, note="not applicable: this encoder has no text tower")


def summary(name: str, **changes: Any) -> Summary:
    """Return what a run of 640 samples leaves."""
    base = Summary(
        name=name,
        samples_seen=640,
        steps=10,
        sample_hash="5a5a",
        initial_encoder="1e1e",
        bad_samples=0,
        skipped_steps=0,
        flops=6.4e9,
        wall_seconds=75.0,
        wait_seconds=3.0,
        parameters={"trained": 1_500_000, "encoder": 1_000_000},
        world_size=1,
        precision="fp32",
        device="cpu",
        peak_memory_gb=1.0,
        data="da7a",
    )
    return dataclasses.replace(base, **changes)


def arm(name: str, results: tuple[Result, ...] = (), seed: int = 0, of: Plan | None = None, **changes: Any) -> Arm:
    """Return an arm; `changes` go to its summary."""
    if name == "untrained":
        return Arm(name, seed, "untrained", "1e1e", results)
    chosen = of or plan()
    kind: Kind = "method" if name in chosen.methods else "reference"
    facts = summary(name, **changes)
    run = to_dict(chosen.run(name, seed, 640))
    parts = {"encoder": 1_000_000, f"{name}_part": 500_000}
    return Arm(name, seed, kind, facts.initial_encoder, results, facts, run, parts)


def study(*arms: Arm, of: Plan | None = None, directory: Path = Path("nowhere")) -> StudyResult:
    """Return a study of `arms`."""
    chosen = of or plan()
    samples = {name: 640 for name in chosen.arms}
    return StudyResult(chosen, directory, samples, arms, {"python": "3"}, "altsight study plan.toml", "cpu")
