"""Text4Vis on made videos: class names are worth more than training, and order is seen by a temporal head only.

About five minutes on a core of its own. Settings are the same for all arms that are compared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from altsight.data.views import Crop
from altsight.evals.base import Result
from altsight.evals.bootstrap import hits_of, interval, paired_difference
from altsight.transfer.base import FitConfig
from altsight.transfer.text4vis import TemporalConfig, Text4Vis
from altsight.transfer.video import Video
from tests.toy import PROMPT, toy_clip
from tests.transfer.shape_videos import write_motions, write_shape_videos

pytestmark = pytest.mark.slow
SEEDS = 3
OPTIM = replace(Text4Vis.optim, lr=2e-3)


def top1(folder: Path, out: Path, steps: int, **changes: Any) -> tuple[Result, Result]:
    """Return the accuracy after `steps` steps on 40 videos each, and that without training."""
    settings = Video(
        test=folder / "test",
        data=folder / "train",
        prompt=PROMPT,
        frames=4,
        temporal=TemporalConfig("mean"),
        crop=Crop((0.6, 1.0), (0.9, 1.1), flip=False),
        grayscale=0.0,
        optim=OPTIM,
        fit=FitConfig(epochs=steps, batch=40, precision="fp32", workers=0),
    )
    found = {result.metric: result for result in replace(settings, **changes)(toy_clip(), out)}
    return found["top1"], found["top1 untrained"]


def shown(name: str, hits: list[np.ndarray]) -> np.ndarray:
    """Print the accuracy over all seeds, and return its hits."""
    joined = np.concatenate(hits)
    at = interval(joined)
    seeds = ", ".join(f"{part.mean():.3f}" for part in hits)
    print(f"{name}: {at.value:.3f} [{at.low:.3f}, {at.high:.3f}] (seeds {seeds})")
    return joined


def few_shot(folder: Path, arms: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Return arm -> hits over all seeds, trained on two videos of each of 20 classes."""
    hits: dict[str, list[np.ndarray]] = {}
    for seed in range(SEEDS):
        home = folder / str(seed)
        write_shape_videos(home / "train", 2, seed=100 + seed)
        write_shape_videos(home / "test", 10, seed=200 + seed)
        for number, (name, (steps, changes)) in enumerate(arms.items()):
            trained, untrained = top1(home, home / f"out-{number}", steps, **changes)
            hits.setdefault(name, []).append(hits_of(trained))
        hits.setdefault("no training", []).append(hits_of(untrained))
    return {name: shown(name, found) for name, found in hits.items()}


def test_class_names_after_10_steps_beat_a_random_matrix_after_60(tmp_path: Path) -> None:
    arms = {"text, 10 steps": (10, {}), "random, trained, 60 steps": (60, {"init": "normal", "trainable": True})}
    found = few_shot(tmp_path, arms)
    gain = paired_difference(found["text, 10 steps"], found["random, trained, 60 steps"])
    print(f"text - random: {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]")
    assert gain.low > 0


def test_the_source_orders_text_lda_orthogonal_and_random(tmp_path: Path) -> None:
    """Only the ends of the order are asked for; the rest is shown."""
    kinds = ("text", "lda", "orthogonal", "normal")
    found = few_shot(tmp_path, {kind: (30, {"init": kind}) for kind in kinds})
    assert paired_difference(found["text"], found["lda"]).low > 0
    assert paired_difference(found["lda"], found["normal"]).low > 0


def test_left_and_right_are_told_apart_by_the_order_of_frames_only(tmp_path: Path) -> None:
    hits: dict[str, list[np.ndarray]] = {}
    for seed in range(2):
        home = tmp_path / str(seed)
        write_motions(home / "train", 100, seed=300 + seed, frames=4)
        write_motions(home / "test", 100, seed=400 + seed, frames=4)
        for kind in ("mean", "transformer"):
            # A crop that keeps both ends of the way.
            crop = Crop((0.8, 1.0), (0.9, 1.1), flip=False)
            changes = {"temporal": TemporalConfig(kind), "prompt": "a {} shape", "crop": crop}
            # 200 videos in batches of 40: 250 steps. The transformer learns nothing for the first hundred.
            trained, _ = top1(home, home / f"out-{kind}", 50, **changes)
            hits.setdefault(kind, []).append(hits_of(trained))
    found = {name: shown(name, part) for name, part in hits.items()}
    chance = interval(found["mean"])
    assert chance.low < 0.5 < chance.high
    assert interval(found["transformer"]).low > 0.8
