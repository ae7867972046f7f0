"""Metrics against the reference libraries on the same predictions, to 1e-6; intervals against plain resampling."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, roc_auc_score
from sklearn.metrics import top_k_accuracy_score as sklearn_top_k
from torchmetrics.functional.retrieval import retrieval_hit_rate

from altsight.evals.bootstrap import class_interval, interval, statistic_interval, unpaired_difference
from altsight.evals.metrics import average_precision, eleven_point, roc_auc
from altsight.evals.retrieval import Gallery, image_to_text, ranks, text_to_image
from tests.evals.test_retrieval import gallery

ONE = np.ones((1, 90))


def predictions(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    truth = (draw.random(90) < 0.3).astype(float)
    scores = draw.normal(size=90) + truth
    return (np.round(scores, 1) if ties else scores), truth


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ranking_metrics_are_those_of_scikit_learn(seed: int, ties: bool) -> None:
    scores, truth = predictions(seed, ties)
    assert average_precision(scores, truth, ONE)[0] == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
    assert roc_auc(scores, truth, ONE)[0] == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_counts_are_copies_of_the_images(ties: bool) -> None:
    scores, truth = predictions(0, ties)
    counts = np.random.default_rng(1).multinomial(90, np.full(90, 1 / 90), size=20).astype(float)
    for ours, theirs in ((average_precision, average_precision_score), (roc_auc, roc_auc_score)):
        found = ours(scores, truth, counts)
        for row, value in zip(counts.astype(int), found, strict=True):
            assert value == pytest.approx(theirs(np.repeat(truth, row), np.repeat(scores, row)), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_eleven_point_average_precision_is_the_published_formula(seed: int) -> None:
    scores, truth = predictions(seed)
    ordered = truth[np.argsort(-scores)]
    points = [(ordered[:n].sum() / ordered.sum(), ordered[:n].mean()) for n in range(1, 91)]
    expected = np.mean([max(p for r, p in points if r >= level - 1e-12) for level in np.arange(11) / 10])
    assert eleven_point(scores, truth, ONE)[0] == pytest.approx(expected, abs=1e-9)


def test_a_class_without_positives_has_no_precision() -> None:
    scores, _ = predictions(0)
    assert np.isnan(average_precision(scores, np.zeros(90), ONE)[0])
    assert np.isnan(eleven_point(scores, np.zeros(90), ONE)[0])


def test_accuracies_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    scores, labels = torch.tensor(draw.normal(size=(200, 9))), torch.tensor(draw.integers(0, 9, 200))
    found = ranks(scores, labels)
    predicted = scores.argmax(dim=1)
    assert interval(found < 1).value == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert interval(found < 5).value == pytest.approx(sklearn_top_k(labels, scores, k=5), abs=1e-6)
    assert class_interval(found < 1, labels).value == pytest.approx(
        balanced_accuracy_score(labels, predicted), abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_the_hit_rate_of_torchmetrics(k: int) -> None:
    of_images = gallery(images=37)
    owners = of_images.owners
    texts = torch.nn.functional.normalize(
        torch.randn(len(owners), 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    # Torchmetrics leaves open what comes first of equals, so no caption is shared here.
    g = Gallery(of_images.images, texts, torch.arange(len(owners)), owners)
    similarity = g.images @ g.texts.T
    to_text = [retrieval_hit_rate(similarity[i], owners == i, top_k=k) for i in range(len(g.images))]
    to_image = [
        retrieval_hit_rate(similarity[:, c], torch.arange(len(g.images)) == owners[c], top_k=k)
        for c in range(len(owners))
    ]
    assert float((image_to_text(g) < k).double().mean()) == pytest.approx(float(torch.stack(to_text).mean()), abs=1e-6)
    assert float((text_to_image(g) < k).double().mean()) == pytest.approx(float(torch.stack(to_image).mean()), abs=1e-6)


def test_the_interval_of_a_statistic_is_that_of_plain_resampling() -> None:
    scores, truth = predictions(2)
    found = statistic_interval(partial(roc_auc, scores, truth), 90)
    draw = np.random.default_rng(0)
    rows = draw.integers(90, size=(2000, 90))
    low, high = np.quantile([roc_auc_score(truth[r], scores[r]) for r in rows], [0.025, 0.975])
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_an_unpaired_difference_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        a, b = draw.random(150) < 0.8, draw.random(100) < 0.6
        found = unpaired_difference(a, b, seed)
        assert found.value == pytest.approx(a.mean() - b.mean())
        covered += found.low <= 0.2 <= found.high
    assert 0.90 <= covered / 200 <= 0.99
