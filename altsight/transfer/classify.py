"""What trained classifiers share: how they are scored on images that their training has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.base import Result, Split, View
from altsight.evals.bootstrap import class_interval, scored, statistic_interval
from altsight.evals.features import content_hash, extract, join_notes, left_out, rate_of_commonest
from altsight.evals.metrics import Values, average_precision
from altsight.evals.retrieval import ranks
from altsight.transfer.labels import LabelledImages, Labels, open_labelled

TOP = (1, 5)


def open_sets(data: str, val: str, test: str, labels: Labels) -> tuple[LabelledImages, dict[str, LabelledImages]]:
    """Return the training images, and by split those that are scored; val may be empty.

    Raises:
        UserError: one of them cannot be read or used, or has classes that the training images do not have.
    """
    train = open_labelled(data, labels)
    paths = {"val": val, "test": test} if val else {"test": test}
    return train, {split: open_labelled(path, labels, train.classes) for split, path in paths.items()}


def score(
    view: View, logits: Callable[[Tensor], Tensor], images: LabelledImages, split: str, evaluator: str, seed: int
) -> Iterator[Result]:
    """Yield top-1, top-5 (with more than five classes) and mean-per-class accuracy; with several labels, the mAP.

    Args:
        view: yields the features that the classifier reads.
        logits: features (n, D), on the CPU -> scores of the classes (n, C).
        split: name of the set. seed: of the training.

    Raises:
        UserError: no image can be decoded, or none of them has a class.
    """
    extracted = extract(view, Split(split, images.pairs))
    ids = [images.ids(sample) for sample in extracted.kept]
    rows = [row for row, found in enumerate(ids) if found or images.labels.several]
    targets = torch.zeros(len(rows), len(images.classes))
    for place, row in enumerate(rows):
        targets[place, list(ids[row])] = 1
    reasons = {"a broken image": extracted.broken, "no class": len(ids) - len(rows)}
    facts: dict[str, Any] = {
        "task": images.source,
        "evaluator": evaluator,
        "split": split,
        "feature_point": view.feature_point,
        "data": content_hash((extracted.digests[row], ids[row]) for row in rows),
        "note": left_out(Split(split, images.pairs), reasons),
        "extra": {"classes": len(images.classes), "seed": seed},
    }
    found = logits(extracted.vectors[rows]).float().cpu()
    if images.labels.several:
        yield precision(view, found, targets, facts)
    else:
        yield from accuracies(view, found, targets.argmax(dim=1), facts)


def accuracies(view: View, logits: Tensor, labels: Tensor, facts: dict[str, Any]) -> Iterator[Result]:
    """Yield top-1, top-5 (with more than five classes) and mean-per-class accuracy of logits (n, C) and labels (n,).

    facts: the remaining fields of `Result`.
    """
    classes = logits.shape[1]
    places = ranks(logits, labels)
    facts["extra"] |= {"commonest": rate_of_commonest(labels, labels)}
    for k in TOP:
        if k < classes:
            yield scored(view, places < k, metric=f"top{k}", chance=k / classes, **facts)
    mean, present = class_interval(places < 1, labels), len(labels.unique())
    facts["note"] = join_notes(facts["note"], "" if present == classes else f"{present} of {classes} classes occur")
    yield Result(
        metric="mean_class",
        value=mean.value,
        low=mean.low,
        high=mean.high,
        chance=1 / classes,
        n=len(labels),
        preprocess=view.preprocess.hash(),
        **facts,
    )


def precision(view: View, logits: Tensor, targets: Tensor, facts: dict[str, Any]) -> Result:
    """Return the mean average precision over the classes that occur; logits and targets of 0 and 1 are (n, C)."""
    occurring = targets.any(dim=0)
    if not occurring.any():
        raise UserError(f"no image of '{facts['task']}' has a class, so there is nothing to score: mend its labels.")
    scores, truth = logits[:, occurring].double().numpy(), targets[:, occurring].double().numpy()

    def mean(counts: Values) -> Values:
        each = [average_precision(scores[:, c], truth[:, c], counts) for c in range(truth.shape[1])]
        return np.asarray(np.nanmean(each, axis=0))

    found, missing = statistic_interval(mean, len(truth)), int((~occurring).sum())
    return Result(
        metric="map",
        value=found.value,
        low=found.low,
        high=found.high,
        # What scores that say nothing reach: the share of images of each class.
        chance=float(truth.mean()),
        n=len(truth),
        preprocess=view.preprocess.hash(),
        **facts | {"note": join_notes(facts["note"], f"classes that do not occur: {missing}" if missing else "")},
    )
