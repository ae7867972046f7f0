"""What classifiers are scored by, against scikit-learn on the same predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    top_k_accuracy_score,
)
from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.base import Result
from altsight.transfer.classify import open_sets, score
from altsight.transfer.labels import LabelledImages, Labels
from tests.transfer.test_finetune import TINY, tar_of, view_of

CLASSES = tuple("abcdefg")


def images_of(path: Path, labels: list[Any], several: bool = False) -> LabelledImages:
    """Return grey images whose classes are letters."""
    written = [list(label) if several else label for label in labels]
    _, held_out = open_sets(
        tar_of(path / "train.tar", list(CLASSES), grey=True),
        "",
        tar_of(path / "test.tar", written, grey=True),
        Labels("kinds", several),
    )
    return held_out["test"]


def scores_of(images: LabelledImages, logits: Tensor) -> dict[str, Result]:
    found = score(view_of(TINY), lambda features: logits[: len(features)], images, "test", "test", seed=3)
    return {result.metric: result for result in found}


def test_accuracies_are_those_of_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [*CLASSES, *rng.choice(list(CLASSES), 60, p=[0.4, *[0.1] * 6])]
    logits = torch.from_numpy(rng.normal(size=(67, 7))).float()
    found = scores_of(images_of(tmp_path, labels), logits)
    truth = np.array([CLASSES.index(label) for label in labels])
    expected = {
        "top1": accuracy_score(truth, logits.argmax(dim=1)),
        "top5": top_k_accuracy_score(truth, logits.numpy(), k=5),
        "mean_class": balanced_accuracy_score(truth, logits.argmax(dim=1)),
    }
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        result = found[metric]
        assert result.value == pytest.approx(value, abs=1e-6)
        assert result.low is not None and result.high is not None and result.low < value < result.high
        assert (result.n, result.extra["seed"], result.extra["classes"], result.split) == (67, 3, 7, "test")
        assert result.chance == pytest.approx({"top1": 1, "top5": 5, "mean_class": 1}[metric] / 7)


def test_mean_average_precision_is_that_of_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    targets = rng.random((50, 7)) < 0.3
    targets[:, 6] = False
    labels = ["".join(np.array(list(CLASSES))[row]) for row in targets]
    # Rounded, so that some scores are equal.
    logits = torch.from_numpy((rng.normal(size=(50, 7)) + targets).round(1))
    (result,) = scores_of(images_of(tmp_path, labels, several=True), logits).values()
    expected = average_precision_score(targets[:, :6], logits[:, :6].numpy(), average="macro")
    assert result.value == pytest.approx(expected, abs=1e-6)
    assert result.low is not None and result.high is not None and result.low < expected < result.high
    assert result.chance == pytest.approx(targets[:, :6].mean())
    assert result.note == "classes that do not occur: 1"


def test_images_that_cannot_be_scored_are_told(tmp_path: Path) -> None:
    images = images_of(tmp_path, ["a", "", "b", "a"])
    found = scores_of(images, torch.eye(7)[[0, 0, 0]])
    assert found["top1"].value == pytest.approx(2 / 3)
    assert found["top1"].note == "test: left out 1 with no class"
    assert found["mean_class"].note == "test: left out 1 with no class; 2 of 7 classes occur"


def test_a_set_without_any_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a class in the field 'kinds'"):
        images_of(tmp_path, ["", "", ""], several=True)
