"""Bootstrap 95 % intervals of an accuracy, and of the paired difference of two on the same test items."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.base import Result, View

RESAMPLES = 2000
LEVEL = 0.95
BLOCK_ELEMENTS = 2**21
"""Counts of resamples held at a time."""

Statistic = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def interval(values: npt.ArrayLike, groups: npt.ArrayLike | None = None, seed: int = 0) -> Interval:
    """Return the mean of `values` (n,) and its percentile interval over seeded resamples (Efron 1979).

    Where no item differs from the others (an accuracy of 0 or 1) the interval has no width: a resample cannot show
    what was not seen.

    Args:
        values: one number for each test item.
        groups: (n,) ids; items of one group (the captions of one image) are not independent and are drawn together.
    """
    items = np.asarray(values, dtype=np.float64)
    if not len(items):
        raise UserError("an interval needs at least one test item, and the split has none.")
    ids = np.arange(len(items)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = np.stack([np.bincount(ids, weights=items), np.bincount(ids)], axis=1)
    # A resample's mean depends only on how often each distinct unit was drawn, and these counts are multinomial:
    # the same distribution as drawing n indices, at a cost that does not grow with n.
    distinct, counts = np.unique(units, axis=0, return_counts=True)
    draw = key(seed, 0, "bootstrap").generator()
    drawn = draw.multinomial(len(units), counts / len(units), size=RESAMPLES)
    sums, sizes = (drawn @ distinct).T
    low, high = np.quantile(sums / sizes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(items.mean()), float(low), float(high))


def class_interval(hits: npt.ArrayLike, labels: npt.ArrayLike, seed: int = 0) -> Interval:
    """Return the mean over classes of the accuracy within a class, and its interval; each class is resampled by itself.

    Args:
        hits: (n,) 0 or 1 for each test item. labels: (n,) its class. Always answering one class scores 1 / classes.
    """
    correct = np.asarray(hits, dtype=np.float64)
    if not len(correct):
        raise UserError("an interval needs at least one test item, and the split has none.")
    ids = np.unique(np.asarray(labels), return_inverse=True)[1]
    sizes, right = np.bincount(ids), np.bincount(ids, weights=correct)
    # The hits among n_c draws with replacement from a class are binomial.
    drawn = key(seed, 0, "bootstrap").generator().binomial(sizes, right / sizes, size=(RESAMPLES, len(sizes)))
    low, high = np.quantile((drawn / sizes).mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float((right / sizes).mean()), float(low), float(high))


def statistic_interval(statistic: Statistic, n: int, seed: int = 0) -> Interval:
    """Return a statistic of `n` test items that is no mean of them (a mean average precision), with its interval.

    Args:
        statistic: counts (r, n), how often each item was drawn in each of r resamples -> values (r,).
    """
    if not n:
        raise UserError("an interval needs at least one test item, and the split has none.")
    draw = key(seed, 0, "bootstrap").generator()
    block = max(1, BLOCK_ELEMENTS // n)
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    values = [statistic(draw.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)) for size in sizes]
    low, high = np.nanquantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(np.ones((1, n)))[0]), float(low), float(high))


def unpaired_difference(hits_a: npt.ArrayLike, hits_b: npt.ArrayLike, seed: int = 0) -> Interval:
    """Return mean(a) - mean(b) of hits over different test items, with its interval; each set is resampled by itself.

    Args:
        hits_a, hits_b: (n,) and (m,), 0 or 1 for each test item.
    """
    a, b = np.asarray(hits_a, dtype=np.float64), np.asarray(hits_b, dtype=np.float64)
    draw = key(seed, 0, "bootstrap").generator()
    drawn = [draw.binomial(len(hits), hits.mean(), RESAMPLES) / len(hits) for hits in (a, b)]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(a.mean() - b.mean()), float(low), float(high))


def paired_difference(
    correct_a: npt.ArrayLike, correct_b: npt.ArrayLike, groups: npt.ArrayLike | None = None, seed: int = 0
) -> Interval:
    """Return the mean of a - b over the same test items, with its interval; a is better if `low` > 0.

    Raises:
        UserError: the two have different numbers of items.
    """
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.shape != b.shape:
        raise UserError(f"{len(a)} and {len(b)} test items cannot be paired: evaluate both views on the same split.")
    return interval(a - b, groups, seed)


def scored(view: View, hits: npt.ArrayLike, group_sizes: npt.ArrayLike | None = None, **fields: Any) -> Result:
    """Return the accuracy `mean(hits)` with its interval; `fields` are the remaining fields of `Result`.

    Args:
        view: what was evaluated.
        hits: (n,) 0 or 1 for each test item; kept in `extra["hits"]`, a bit each, so that views can be paired.
        group_sizes: number of consecutive items of each group, where items are not independent.
    """
    correct = np.asarray(hits, dtype=bool)
    extra = {"seed": 0, **fields.pop("extra", {}), "hits": base64.b64encode(np.packbits(correct).tobytes()).decode()}
    if group_sizes is not None:
        extra["group_sizes"] = np.asarray(group_sizes).tolist()
    result = Result(n=len(correct), preprocess=view.preprocess.hash(), value=None, extra=extra, **fields)
    found = interval(correct, groups_of(result))
    return replace(result, value=found.value, low=found.low, high=found.high)


def hits_of(result: Result) -> npt.NDArray[np.bool_]:
    """Return the per-item hits (n,) of an accuracy.

    Raises:
        UserError: the result holds none.
    """
    if "hits" not in result.extra:
        raise UserError(f"{result.evaluator} {result.metric} of '{result.task}' holds no per-item hits to compare.")
    packed = np.frombuffer(base64.b64decode(result.extra["hits"]), dtype=np.uint8)
    return np.unpackbits(packed, count=result.n).astype(bool)


def groups_of(result: Result) -> npt.NDArray[np.int64] | None:
    """Return the group (n,) of every test item of an accuracy; None where the items are independent."""
    sizes = result.extra.get("group_sizes")
    return None if sizes is None else np.repeat(np.arange(len(sizes)), sizes)
