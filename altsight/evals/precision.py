"""Mean average precision of several labels an image, with its bootstrap interval."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.bootstrap import LEVEL, RESAMPLES, Interval

Floats = npt.NDArray[np.float64]
BLOCK_ELEMENTS = 2**23
"""Weights of resampled images held at a time."""


def mean_average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike, seed: int = 0) -> Interval:
    """Return the mean over classes of the average precision, and its percentile interval over resampled images.

    The average precision is scikit-learn's: the mean, over the images of a class, of the precision at the place of
    each; images of equal score share a place. Classes without an image are left out.

    Args:
        scores: (n, C) real numbers. targets: (n, C), 1 for the classes of an image and 0 for the others.

    Raises:
        UserError: no image has a class.
    """
    wanted = np.asarray(targets, dtype=bool)
    values = np.asarray(scores, dtype=np.float64)[:, wanted.any(axis=0)]
    wanted = wanted[:, wanted.any(axis=0)]
    if not wanted.size:
        raise UserError("the average precision needs at least one test image with a class, and the split has none.")
    once = np.ones((1, len(wanted)))
    drawn = key(seed, 0, "bootstrap").generator()
    means = []
    size = max(1, BLOCK_ELEMENTS // len(wanted))
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        weights = drawn.multinomial(len(wanted), np.full(len(wanted), 1 / len(wanted)), size=count).astype(np.float64)
        means.append(_mean(values, wanted, weights))
    low, high = np.nanquantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(_mean(values, wanted, once)[0]), float(low), float(high))


def _mean(scores: Floats, targets: npt.NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the mean over classes (R,) for R weightings (R, n) of the images; classes of weight 0 are left out."""
    each = [average_precision(scores[:, c], targets[:, c], weights) for c in range(scores.shape[1])]
    mean: Floats = np.nanmean(np.stack(each), axis=0)
    return mean


def average_precision(scores: Floats, targets: npt.NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the average precision (R,) of one class; NaN where its images have no weight.

    Args:
        scores: (n,). targets: (n,) bool. weights: (R, n), how often each image counts.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], targets[order]
    # The last image of each run of equal scores stands for the place of all of them.
    last = np.searchsorted(-ranked, -ranked, side="right") - 1
    counted = weights[:, order]
    right = np.cumsum(counted * hits, axis=1)[:, last[hits]]
    seen = np.cumsum(counted, axis=1)[:, last[hits]]
    share = counted[:, hits]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(share > 0, right / seen, 0.0)
        found: Floats = (share * precision).sum(axis=1) / share.sum(axis=1)
    return found
