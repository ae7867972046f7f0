"""Corruption robustness: errors under the corruptions of ImageNet-C, and their mean (mCE) relative to a baseline's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.base import Result, Split, Task, View, not_applicable
from altsight.evals.bootstrap import Interval, interval
from altsight.evals.changed import Change, Changed, Pixels
from altsight.evals.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from altsight.evals.features import classes_of, join_notes
from altsight.evals.frozen import NO_PROBE, answerable, frozen_classifier

SIDE = 256
"""Shorter side at which images are corrupted: the scale at which ImageNet-C's images were cut to 224."""
SEED = 0
ALEXNET = dict(
    zip(
        CORRUPTIONS,
        (
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
            *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        ),
        strict=True,
    )
)
"""AlexNet's mean errors on ImageNet-C, as its authors publish them for the mCE."""


def corruptions(view: View, task: Task) -> Iterator[Result]:
    """Yield the error of every corruption (mean over five severities), the clean error, their mean, and the mCE.

    The mCE is the mean over corruptions of the error divided by the baseline's (`task.corrupted_errors`); without a
    baseline there is none. One frozen classifier answers throughout: zero-shot with a text tower, else a linear probe
    on clean images. Randomness is keyed by (seed, index of the image), so all views see the same corrupted images.
    """
    if not task.label or task.multi_label or not len(task.test):
        return
    if not answerable(view, task):
        yield not_applicable(view, task, "corruptions", "mean_error", NO_PROBE)
        return
    classifier = frozen_classifier(view, task)
    hits, test = classifier.hits(view, task, task.test)
    fields: dict[str, Any] = {
        "task": task.name,
        "evaluator": "corruptions",
        "n": len(hits),
        "split": task.test.name,
        "feature_point": view.feature_point + (", projected" if view.is_dual else ""),
        "preprocess": view.preprocess.hash(),
        "data": test.data,
        "note": join_notes(test.note),
    }
    extra = {"classifier": classifier.kind, "seed": SEED, "prompts": list(task.prompts)}
    chance = 1 - 1 / len(classes_of(task))
    yield _result("clean_error", interval(1 - hits.double()), extra, chance=chance, **fields)
    errors = {}
    for name in CORRUPTIONS:
        of_severity = []
        for severity in SEVERITIES:
            split = Split(task.test.name, Changed.of(task.test.source, corruption(name, severity)))
            # Not kept: 75 sets of features would fill memory and disk.
            missed = ~classifier.hits(replace(view, cache={}, store=None), task, split)[0]
            of_severity.append(missed.double().numpy())
        errors[name] = np.mean(of_severity, axis=0)
        severities = [float(missed.mean()) for missed in of_severity]
        yield _result(f"error_{name}", interval(errors[name]), {**extra, "severities": severities}, **fields)
    yield _result("mean_error", interval(np.mean(list(errors.values()), axis=0)), extra, chance=chance, **fields)
    if base := task.corrupted_errors:
        relative = np.mean([errors[name] / base[name] for name in CORRUPTIONS], axis=0)
        yield _result("mce", interval(relative), {**extra, "baseline": dict(base)}, **fields)


def corruption(name: str, severity: int) -> Change:
    """Return the change that brings an image to the scale of ImageNet-C and corrupts it."""

    def change(pixels: Pixels, i: int) -> Pixels:
        height, width = pixels.shape[:2]
        scale = SIDE / min(height, width)
        size = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
        resized = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
        return corrupt(np.asarray(resized), name, severity, key(SEED, i, "corruption"))

    return change


def read_baseline(source: str, task: str) -> Mapping[str, float]:
    """Return corruption -> error of a baseline: "alexnet", or the --out file of one view's evaluation on `task`.

    Raises:
        UserError: the file is missing, or has not one error for every corruption.
    """
    if source == "alexnet":
        return ALEXNET
    try:
        views = json.loads(Path(source).read_text(encoding="utf-8"))
        (results,) = views.values()
        found = {r["metric"]: r["value"] for r in results if (r["evaluator"], r["task"]) == ("corruptions", task)}
        errors = {name: float(found[f"error_{name}"]) for name in CORRUPTIONS}
    except OSError as error:
        raise UserError(f"the baseline '{source}' cannot be read ({error.strerror}).") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"the baseline '{source}' must be what `altsight eval WEIGHTS --evaluators corruptions --out` wrote for one"
            f" model on the task '{task}'."
        ) from None
    if perfect := [name for name, error in errors.items() if not error]:
        raise UserError(
            f"the baseline '{source}' makes no error under {perfect[0]}, so there is no mCE relative to it."
        )
    return errors


def _result(metric: str, found: Interval, extra: dict[str, Any], **fields: Any) -> Result:
    return Result(metric=metric, value=found.value, low=found.low, high=found.high, extra=extra, **fields)
