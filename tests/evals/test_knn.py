from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from altsight.evals import knn as module
from altsight.evals.base import Task, no_split
from altsight.evals.knn import knn, knn_votes
from tests.evals.conftest import MakeSplit, Sample, make_view, near


def slow_votes(
    queries: np.ndarray, gallery: np.ndarray, labels: list[int], classes: int, k: int, t: float
) -> np.ndarray:
    """Return votes by the formula of Wu et al., one pair at a time."""
    votes = np.zeros((len(queries), classes))
    for q, query in enumerate(queries):
        cosines = [float(query @ g) / (math.hypot(*query) * math.hypot(*g)) for g in gallery]
        for i in sorted(range(len(gallery)), key=lambda i: -cosines[i])[:k]:
            votes[q, labels[i]] += math.exp(cosines[i] / t)
    return votes


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_votes_are_the_formula_whatever_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    draw = np.random.default_rng(0)
    queries, gallery = draw.normal(size=(17, 6)), draw.normal(size=(50, 6)) * 3
    labels = draw.integers(0, 4, 50)
    found = knn_votes(torch.tensor(queries), torch.tensor(gallery), torch.tensor(labels), 4, k=7)
    expected = slow_votes(queries, gallery, labels.tolist(), 4, 7, 0.07)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_the_answers_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    centres, labels = draw.normal(size=(6, 8)), draw.integers(0, 6, 700)
    x = centres[labels] + 1.3 * draw.normal(size=(700, 8))
    known = KNeighborsClassifier(20, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine", algorithm="brute")
    expected = known.fit(x[:400], labels[:400]).predict(x[400:])
    votes = knn_votes(torch.tensor(x[400:]), torch.tensor(x[:400]), torch.tensor(labels[:400]), 6)
    found = votes.argmax(dim=1).numpy()
    assert found.tolist() == expected.tolist()
    accuracy = float((found == labels[400:]).mean())
    assert accuracy == pytest.approx(accuracy_score(labels[400:], expected), abs=1e-6)
    assert 0.3 < accuracy < 1


def test_a_small_gallery_votes_as_a_whole() -> None:
    votes = knn_votes(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), 3)
    assert votes.argmax(dim=1).tolist() == [0, 1, 2]
    assert (votes > 0).all()


def test_top1_of_a_view(colours: Task) -> None:
    view = make_view()
    (result,) = knn(view, colours)
    assert result.value == 1
    assert result.chance == pytest.approx(1 / 3)
    assert (result.n, result.split, result.feature_point, result.metric) == (24, "test", "mean", "top1")
    assert result.preprocess == view.preprocess.hash()
    assert len(result.data) == 12
    assert result.extra["commonest"] == pytest.approx(1 / 3)


def test_shuffled_labels_give_chance(make_split: MakeSplit) -> None:
    draw = np.random.default_rng(0)

    def shuffled(name: str, count: int) -> list[Sample]:
        kinds = list(draw.permutation(["a", "b", "c", "d"] * (count // 4)))
        return [Sample(near("grey", i), str(kind)) for i, kind in enumerate(kinds)]

    splits = [make_split(name, shuffled(name, 120)) for name in ("train", "val", "test")]
    (result,) = knn(make_view(batch_size=64), Task("noise", *splits, label="kind"))
    assert result.low is not None and result.high is not None
    assert result.low < 0.25 < result.high


def test_it_needs_no_validation_split(colours: Task) -> None:
    assert len(list(knn(make_view(), replace(colours, val=no_split("val"))))) == 1


def test_a_task_without_labels_yields_nothing(colours: Task) -> None:
    assert list(knn(make_view(), Task("plain", colours.train, colours.val, colours.test))) == []
