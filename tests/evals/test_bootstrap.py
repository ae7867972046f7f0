from __future__ import annotations

import numpy as np
import pytest

from altsight.core.errors import UserError
from altsight.evals.bootstrap import (
    Interval,
    class_interval,
    groups_of,
    hits_of,
    interval,
    paired_difference,
    scored,
)
from tests.evals.conftest import make_view


def test_interval_is_that_of_resampled_indices() -> None:
    draw = np.random.default_rng(0)
    values = draw.choice([0.0, 0.25, 1.0], size=150, p=[0.5, 0.2, 0.3])
    means = [values[draw.integers(0, 150, 150)].mean() for _ in range(20_000)]
    found = interval(values)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)


def test_interval_covers_the_true_proportion_95_times_in_100() -> None:
    draw = np.random.default_rng(1)
    trials = [interval(draw.random(200) < 0.3, seed=trial) for trial in range(400)]
    covered = np.mean([found.low <= 0.3 <= found.high for found in trials])
    # The standard error over 400 trials is 0.011.
    assert 0.91 < covered < 0.98


def test_grouped_items_are_resampled_together() -> None:
    draw = np.random.default_rng(2)
    images = draw.random(80) < 0.5
    five_captions = np.repeat(images, 5)
    alone, grouped = interval(images), interval(five_captions, np.repeat(np.arange(80), 5))
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, abs=0.02)
    naive = interval(five_captions)
    assert naive.high - naive.low < 0.6 * (grouped.high - grouped.low)


def test_interval_of_groups_of_different_size_is_about_the_mean_over_items() -> None:
    found = interval([1, 1, 1, 0], [0, 0, 0, 1])
    assert found.value == 0.75
    assert (found.low, found.high) == (0, 1)


def test_interval_is_the_same_at_the_same_seed_only() -> None:
    values = np.random.default_rng(3).random(300)
    assert interval(values, seed=5) == interval(values, seed=5)
    assert interval(values, seed=5) != interval(values, seed=6)


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    draw = np.random.default_rng(4)
    base = draw.random(400) < 0.5
    better = base | (draw.random(400) < 0.08)
    assert interval(better).low < interval(base).high
    found = paired_difference(better, base)
    assert found.low > 0
    assert found.value == pytest.approx(better.mean() - base.mean())
    assert paired_difference(base, better).high < 0


def test_pairing_of_equal_views_holds_zero() -> None:
    draw = np.random.default_rng(5)
    a, b = draw.random(300) < 0.6, draw.random(300) < 0.6
    found = paired_difference(a, b)
    assert found.low < 0 < found.high


def test_different_test_items_cannot_be_paired() -> None:
    with pytest.raises(UserError, match="3 and 2 test items"):
        paired_difference([1, 0, 1], [1, 0])


def test_no_items_is_an_error() -> None:
    with pytest.raises(UserError, match="at least one test item"):
        interval([])


def test_a_result_keeps_its_hits_in_a_bit_each() -> None:
    hits = np.random.default_rng(6).random(1001) < 0.7
    result = scored(make_view(), hits, task="t", evaluator="knn", metric="top1", extra={"k": 20})
    assert result.n == 1001 and result.extra["k"] == 20
    assert result.value == pytest.approx(hits.mean())
    assert result.low is not None and result.high is not None and result.low < hits.mean() < result.high
    np.testing.assert_array_equal(hits_of(result), hits)
    assert len(result.extra["hits"]) < 1001 / 5
    assert groups_of(result) is None


def test_a_result_keeps_its_groups() -> None:
    result = scored(make_view(), [1, 0, 0], [2, 1], task="t", evaluator="retrieval", metric="r1")
    groups = groups_of(result)
    assert groups is not None and groups.tolist() == [0, 0, 1]


def test_a_result_without_hits_says_so() -> None:
    from altsight.evals.base import Result

    with pytest.raises(UserError, match="no per-item hits"):
        hits_of(Result("t", "collapse", "std", 0.5))


def test_mean_over_classes_ignores_how_common_a_class_is() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    always_zero = (labels == 0).astype(float)
    assert class_interval(always_zero, labels) == Interval(0.5, 0.5, 0.5)
    slow = [np.mean(always_zero[labels == c]) for c in (0, 1)]
    assert class_interval(always_zero, labels).value == np.mean(slow)


def test_the_interval_of_the_mean_over_classes_covers_the_truth() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [200, 100, 60, 40])
    truth = np.array([0.9, 0.5, 0.3, 0.7])
    covered = 0
    for seed in range(200):
        found = class_interval(draw.random(len(labels)) < truth[labels], labels, seed)
        covered += found.low <= truth.mean() <= found.high
    assert 180 <= covered <= 199
