"""Zero-shot classification with prompt templates (CLIP; specification D1)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.base import Result, Task, View, not_applicable
from altsight.evals.bootstrap import class_interval, scored
from altsight.evals.features import classes_of, finite, join_notes, joint_vectors, labelled, rate_of_commonest
from altsight.evals.retrieval import ranks

TOP = (1, 5)


def zeroshot(view: View, task: Task) -> Iterator[Result]:
    """Yield top-1 accuracy on the test split, top-5 with more than five classes, and the mean over classes of top-1.

    The mean over classes (D1.4) tells a classifier that always answers the commonest class from one that sees.
    """
    if not task.label:
        return
    classes = classes_of(task)
    tops = [k for k in TOP if k < len(classes)]
    if not view.is_dual:
        for metric in (*(f"top{k}" for k in tops), "mean_class"):
            yield not_applicable(view, task, "zeroshot", metric)
        return
    test = labelled(view, task, task.test)
    images = joint_vectors(view, task.test)[list(test.rows)]
    found = ranks(images @ classifier(view, classes, task.prompts).T, test.labels)
    top1: Result | None = None
    for k in tops:
        result = scored(
            view,
            found < k,
            task=task.name,
            evaluator="zeroshot",
            metric=f"top{k}",
            chance=k / len(classes),
            split=task.test.name,
            feature_point=f"{view.feature_point}, projected",
            data=test.data,
            note=test.note,
            extra={
                "classes": len(classes),
                "prompts": list(task.prompts),
                "commonest": rate_of_commonest(test.labels, test.labels),
            },
        )
        top1 = top1 or result
        yield result
    mean = class_interval(found < 1, test.labels)
    if top1 is not None:
        present = len(test.labels.unique())
        note = join_notes(top1.note, "" if present == len(classes) else f"{present} of {len(classes)} classes occur")
        extra = {"classes": len(classes), "prompts": list(task.prompts)}
        yield replace(top1, metric="mean_class", value=mean.value, low=mean.low, high=mean.high, note=note, extra=extra)


def classifier(view: View, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return one unit vector (classes, E) for each class: the normalised mean of its prompts' unit vectors.

    Kept in `view.cache` for each set of classes and prompts.

    Raises:
        UserError: a prompt has no `{}` for the class name, or there is none.
    """
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(
                f"the prompt '{prompt}' needs one {{}} where the class name goes, as in 'a photo of a {{}}'."
            )
    if not prompts:
        raise UserError("zero-shot classification needs at least one prompt, such as 'a photo of a {}'.")
    name = "zeroshot/" + json.dumps([list(classes), list(prompts)])
    if name not in view.cache:
        texts = [prompt.replace("{}", words(label)) for label in classes for prompt in prompts]
        vectors = finite(view.encode_text(texts), view).unflatten(0, (len(classes), len(prompts)))
        view.cache[name] = F.normalize(vectors.mean(dim=1), dim=-1)
    return cast(Tensor, view.cache[name])


def words(label: str) -> str:
    """Return a label as words: 'animal-mammal' and 'animal_mammal' become 'animal mammal'."""
    return re.sub(r"[\s_\-/]+", " ", label).strip()
