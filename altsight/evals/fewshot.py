"""VTAB's few-shot protocol: 1,000 training examples a task, and means over the tasks of a suite (specification D9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.core.rng import key
from altsight.data.sources import Pairs
from altsight.evals.base import Result, Split, Task, View
from altsight.evals.bootstrap import LEVEL, RESAMPLES, interval
from altsight.evals.features import classes_of, content_hash, join_notes, labelled, rate_of_commonest
from altsight.evals.linear import choose

TRAIN, VAL = 800, 200
"""Examples that the probe is fitted to while its strength is chosen, and those it is chosen on; then both."""
DRAWS = 3
"""Sets of 1,000 examples that are drawn; the accuracy is their mean."""


def fewshot(view: View, task: Task) -> Iterator[Result]:
    """Yield the top-1 accuracy on the whole test split of a linear probe on 1,000 training examples.

    Drawn uniformly by seed, as VTAB's splits are (not class by class). Where the task has a validation split, the 200
    come from it. The probe is the L-BFGS sweep on frozen features, not VTAB's fine-tuning: see docs/evaluation.md.
    """
    if not task.label or task.multi_label or not len(task.train) or not len(task.test):
        return
    test = labelled(view, task, task.test)
    classes, means, data, notes = len(classes_of(task)), [], [test.data], [test.note]
    hits = []
    for seed in range(DRAWS):
        train, val = (labelled(view, task, split) for split in drawn(task, seed))
        chosen = choose(train, val, view.device)
        hits.append((chosen.fit.predict(test.vectors) == test.labels).double().numpy())
        means.append(float(hits[-1].mean()))
        data += [train.data, val.data]
        notes += [train.note, val.note, chosen.note]
    of_image = np.mean(hits, axis=0)
    found = interval(of_image)
    yield Result(
        task=task.name,
        evaluator="fewshot",
        metric="top1",
        value=found.value,
        low=found.low,
        high=found.high,
        chance=1 / classes,
        n=len(test.labels),
        split=task.test.name,
        feature_point=view.feature_point,
        preprocess=view.preprocess.hash(),
        data=content_hash(data),
        note=join_notes(*notes),
        extra={
            "seed": list(range(DRAWS)),
            "draws": means,
            "examples": len(train.labels) + len(val.labels),
            "group": task.group,
            "classes": classes,
            "commonest": rate_of_commonest(test.labels, test.labels),
            "right": np.bincount(np.round(of_image * DRAWS).astype(int), minlength=DRAWS + 1).tolist(),
        },
    )


@dataclass(frozen=True)
class Chosen(Pairs):
    """Some pairs of others. rows: their places there."""

    rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> bytes:
        """Return the encoded image of pair `i`; BrokenSample where it cannot be read."""
        return super().image(self.rows[i])

    def fields(self, i: int) -> dict[str, Any]:
        """Return the fields of pair `i`; {} where it cannot be read."""
        return super().fields(self.rows[i])


def drawn(task: Task, seed: int) -> tuple[Split, Split]:
    """Return 800 examples to fit to and 200 to choose on, or as many in this ratio as there are."""
    at = key(seed, 0, f"fewshot/{task.name}")
    order = at.child("train").generator().permutation(len(task.train))
    if len(task.val):
        others = at.child("val").generator().permutation(len(task.val))
        return _chosen(task.train, order[:TRAIN]), _chosen(task.val, others[:VAL])
    used = order[: TRAIN + VAL]
    held = max(1, len(used) * VAL // (TRAIN + VAL))
    return _chosen(task.train, used[held:]), _chosen(task.train, used[:held])


def suite(results: Sequence[Result]) -> Iterator[Result]:
    """Yield the mean accuracy over every group of tasks and over all of them (VTAB's 19); nothing without groups.

    The interval resamples the test images of each task by itself.
    """
    mine = [result for result in results if result.evaluator == "fewshot" and result.extra["group"]]
    groups = dict.fromkeys(str(result.extra["group"]) for result in mine)
    for name in groups:
        yield _mean(f"group {name}", [result for result in mine if result.extra["group"] == name])
    if mine:
        yield _mean("all tasks", mine)


def _mean(name: str, members: Sequence[Result]) -> Result:
    draw = key(0, 0, "bootstrap").generator()
    levels = np.arange(DRAWS + 1) / DRAWS
    resampled = [
        draw.multinomial(r.n, np.array(r.extra["right"]) / r.n, size=RESAMPLES) @ levels / r.n for r in members
    ]
    low, high = np.quantile(np.mean(resampled, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tasks = [result.task for result in members]
    return replace(
        members[0],
        task=name,
        metric="mean_top1",
        value=float(np.mean([result.value for result in members])),
        low=float(low),
        high=float(high),
        chance=float(np.mean([result.chance for result in members])),
        n=sum(result.n for result in members),
        data=content_hash([result.data for result in members]),
        note="",
        extra={"seed": members[0].extra["seed"], "tasks": tasks},
    )


def _chosen(split: Split, rows: npt.NDArray[np.int64]) -> Split:
    of = split.source
    return Split(
        split.name, Chosen(of.index, of.captions, of.label, of.classes, of.images, tuple(sorted(rows.tolist())))
    )
