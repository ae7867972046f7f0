"""Robustness sets: what is left of the accuracy on a clean set (ImageNet-V2, -A, -R, Sketch, ObjectNet; spec. D8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from altsight.evals.base import Result, Task, View, not_applicable
from altsight.evals.bootstrap import scored, unpaired_difference
from altsight.evals.features import classes_of, content_hash, join_notes
from altsight.evals.frozen import NO_PROBE, answerable, frozen_classifier


def robustness(view: View, task: Task) -> Iterator[Result]:
    """Yield top-1 on the set, on the clean task among the same classes, and the drop from the one to the other.

    Dual encoders answer by the prompts of each task, others by one linear probe on the clean task's training split.
    Answers are restricted to the classes that the set has, on the clean images too where it has all of them.
    """
    if task.clean is None or not task.label or task.multi_label or task.clean.multi_label or not len(task.test):
        return
    if not answerable(view, task.clean):
        yield not_applicable(view, task, "robustness", "drop", NO_PROBE)
        return
    of_clean = frozen_classifier(view, task.clean)
    classes = classes_of(task)
    same = set(classes) <= set(of_clean.classes)
    if not same and not view.is_dual:
        yield not_applicable(view, task, "robustness", "drop", f", and a probe on '{task.clean.name}' has other labels")
        return
    classifier = frozen_classifier(view, task) if view.is_dual else of_clean
    clean = replace(task.clean, classes=dict.fromkeys(classes, "")) if same else task.clean
    hits, test = classifier.hits(view, task, task.test)
    clean_hits, reference = of_clean.hits(view, clean, clean.test)
    other = "" if same else f"'{clean.name}' has other labels, and is answered among all of its classes"
    fields: dict[str, Any] = {
        "task": task.name,
        "evaluator": "robustness",
        "feature_point": view.feature_point + (", projected" if view.is_dual else ""),
        "extra": {"classifier": classifier.kind, "clean": clean.name, "prompts": list(task.prompts)},
    }
    for metric, of, correct, used, note in (
        ("top1", task, hits, test, test.note),
        ("clean_top1", clean, clean_hits, reference, join_notes(reference.note, other)),
    ):
        chance, data = 1 / len(classes_of(of)), used.data
        yield scored(view, correct, metric=metric, chance=chance, split=of.test.name, data=data, note=note, **fields)
    drop = unpaired_difference(clean_hits, hits)
    fields["extra"] = {**fields["extra"], "seed": 0}
    yield Result(
        metric="drop",
        value=drop.value,
        low=drop.low,
        high=drop.high,
        n=len(hits),
        split=task.test.name,
        preprocess=view.preprocess.hash(),
        data=content_hash([reference.data, test.data]),
        note=join_notes(test.note, other),
        **fields,
    )
