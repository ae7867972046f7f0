"""Zero-shot classification with prompt templates (CLIP; specification D1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.base import Result, Task, View, not_applicable
from altsight.evals.bootstrap import Interval, class_interval, interval, scored, statistic_interval
from altsight.evals.classes import words as words
from altsight.evals.features import (
    Labelled,
    classes_of,
    content_hash,
    extract,
    finite,
    join_notes,
    joint_vectors,
    label_lists_of,
    labelled,
    left_out,
    rate_of_commonest,
)
from altsight.evals.metrics import MULTI_LABEL, Values, average_precision, eleven_point, roc_auc
from altsight.evals.retrieval import ranks
from altsight.evals.templates import check_prompts

TOP = {"top1": 1, "top5": 5}


def zeroshot(view: View, task: Task) -> Iterator[Result]:
    """Yield the task's metrics on the test split; top-5 needs more than five classes.

    The mean over classes (D1.4) tells a classifier that always answers the commonest class from one that sees. Tasks
    with several labels an image yield the 11-point mean average precision of VOC2007 and the full one.
    """
    if not task.label or not len(task.test):
        return
    classes = classes_of(task)
    wanted = MULTI_LABEL if task.multi_label else task.metrics
    metrics = [metric for metric in wanted if metric not in ("top5", "top1_top5") or len(classes) > TOP["top5"]]
    if "roc_auc" in metrics and len(classes) != 2:
        raise UserError(f"the task '{task.name}' has {len(classes)} classes: roc_auc is of two (leave it out).")
    if not view.is_dual:
        for metric in metrics:
            yield not_applicable(view, task, "zeroshot", metric)
    elif task.multi_label:
        yield from _several_labels(view, task)
    else:
        test = labelled(view, task, task.test)
        scores = joint_vectors(view, task.test)[list(test.rows)] @ class_vectors(view, names_of(task), task.prompts).T
        for metric in metrics:
            yield _result(view, task, metric, test, scores)


def names_of(task: Task) -> tuple[str, ...]:
    """Return what stands for each class in the prompts, in the order of the class ids."""
    return tuple(task.classes.get(label) or words(label) for label in classes_of(task))


def classifier(view: View, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return one unit vector (classes, E) for each label, which stands in the prompts as words; see `class_vectors`."""
    return class_vectors(view, [words(label) for label in classes], prompts)


def class_vectors(view: View, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return one unit vector (names, E) for each name: the normalised mean of its prompts' unit vectors.

    Kept in `view.cache` for each set of names and prompts.

    Raises:
        UserError: a prompt has no `{}` for the class name, or there is none.
    """
    check_prompts(tuple(prompts))
    key = "zeroshot/" + json.dumps([list(names), list(prompts)])
    if key not in view.cache:
        texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
        vectors = finite(view.encode_text(texts), view).unflatten(0, (len(names), len(prompts)))
        view.cache[key] = F.normalize(vectors.mean(dim=1), dim=-1)
    return cast(Tensor, view.cache[key])


def _result(view: View, task: Task, metric: str, test: Labelled, scores: Tensor) -> Result:
    """Return one metric of scores (n, classes) of images with one label."""
    found, count = ranks(scores, test.labels), scores.shape[1]
    fields = _fields(view, task, test.data, test.note)
    commonest = {"commonest": rate_of_commonest(test.labels, test.labels)}
    if metric in TOP:
        fields["extra"] |= commonest
        return scored(view, found < TOP[metric], metric=metric, chance=TOP[metric] / count, **fields)
    if metric == "mean_class":
        present = len(test.labels.unique())
        fields["note"] = join_notes(test.note, "" if present == count else f"{present} of {count} classes occur")
        return _other(view, metric, 1 / count, class_interval(found < 1, test.labels), len(found), fields)
    if metric == "top1_top5":
        both = interval(((found < 1).double() + (found < 5).double()) / 2)
        return _other(view, metric, (1 + 5) / 2 / count, both, len(found), fields)
    # Of two classes, the second one is the positive: in sorted order, as scikit-learn has it.
    margin = (scores[:, 1] - scores[:, 0]).double().numpy()
    area = statistic_interval(partial(roc_auc, margin, test.labels.double().numpy()), len(found))
    return _other(view, metric, 0.5, area, len(found), fields)


def _several_labels(view: View, task: Task) -> Iterator[Result]:
    """Yield the mean average precisions of images with lists of labels; images without a list are left out."""
    classes, lists, extracted = classes_of(task), label_lists_of(task.test, task.label), extract(view, task.test)
    rows = [row for row, sample in enumerate(extracted.kept) if lists[sample]]
    if not rows:
        raise UserError(f"no image of the task '{task.name}' has a list '{task.label}': name another label.")
    used = [lists[extracted.kept[row]] for row in rows]
    truth = torch.tensor([[label in several for label in classes] for several in used]).double().numpy()
    scores = (joint_vectors(view, task.test)[rows] @ class_vectors(view, names_of(task), task.prompts).T).numpy()
    absent = int((truth.sum(axis=0) == 0).sum())
    note = left_out(task.test, {"a broken image": extracted.broken, "no label": len(extracted.kept) - len(rows)})
    data = content_hash((extracted.digests[row], several) for row, several in zip(rows, used, strict=True))
    fields = _fields(view, task, data, join_notes(note, f"{absent} classes occur nowhere" if absent else ""))
    for metric, precision in zip(MULTI_LABEL, (eleven_point, average_precision), strict=True):

        def mean(counts: Values, precision: Any = precision) -> Values:
            of_classes = [precision(scores[:, c], truth[:, c], counts) for c in range(len(classes))]
            return np.asarray(np.nanmean(of_classes, axis=0))

        yield _other(view, metric, None, statistic_interval(mean, len(rows)), len(rows), fields)


def _fields(view: View, task: Task, data: str, note: str) -> dict[str, Any]:
    return {
        "task": task.name,
        "evaluator": "zeroshot",
        "split": task.test.name,
        "feature_point": f"{view.feature_point}, projected",
        "data": data,
        "note": note,
        "extra": {
            "classes": len(classes_of(task)),
            "prompts": list(task.prompts),
            "preprocess": view.preprocess.words(),
        },
    }


def _other(view: View, metric: str, chance: float | None, found: Interval, n: int, fields: dict[str, Any]) -> Result:
    """Return a metric that is no mean of hits."""
    result = Result(metric=metric, value=found.value, low=found.low, high=found.high, chance=chance, n=n, **fields)
    return replace(result, preprocess=view.preprocess.hash(), extra={**result.extra, "seed": 0})
