"""Ranking metrics of classification that are no mean over images, under resamples of the images (specification D1.4).

Each takes scores (n,), truth (n,) and counts (r, n): how often every image was drawn in each of r resamples. Ones give
the metric itself. Images with equal scores are ranked together, as in scikit-learn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

METRICS = ("top1", "top5", "mean_class", "top1_top5", "roc_auc")
"""Zero-shot metrics of a single label; top1_top5 is the mean of both (Kinetics-700)."""
MULTI_LABEL = ("map11", "map")
"""Zero-shot metrics of lists of labels: VOC2007's mean of 11-point average precisions, and of full ones."""

Values = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]


def average_precision(scores: Values, truth: Values, counts: Values) -> Values:
    """Return the average precision (r,): the mean over positives of the precision at their rank; NaN without any."""
    precision, recall = _curve(scores, truth, counts)
    gained = np.diff(recall, axis=1, prepend=0.0)
    return np.asarray((gained * precision).sum(axis=1))


def eleven_point(scores: Values, truth: Values, counts: Values) -> Values:
    """Return VOC2007's average precision (r,): the mean over recalls 0, 0.1 ... 1 of the best precision there."""
    precision, recall = _curve(scores, truth, counts)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros(len(counts))
    for level in range(11):
        # Recalls are ratios of counts: one that equals the level must not fall short of it by rounding.
        reached = recall >= level / 10 - 1e-12
        found += np.where(reached.any(axis=1), best[np.arange(len(best)), reached.argmax(axis=1)], 0.0) / 11
    return np.where(np.isnan(recall[:, -1]), np.nan, found)


def roc_auc(scores: Values, truth: Values, counts: Values) -> Values:
    """Return the area under the ROC curve (r,): the chance that a positive scores above a negative, ties a half."""
    order = np.argsort(scores, kind="stable")
    last, group = _ties(scores[order])
    positive, negative = counts[:, order] * truth[order], counts[:, order] * (1 - truth[order])
    up_to = negative.cumsum(axis=1)[:, last]
    tied = np.diff(up_to, axis=1, prepend=0.0)
    won = (positive * (up_to - tied / 2)[:, group]).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(won / (positive.sum(axis=1) * negative.sum(axis=1)))


def _curve(scores: Values, truth: Values, counts: Values) -> tuple[Values, Values]:
    """Return precision and recall (r, n) where the ranking is cut behind each image and those that tie with it."""
    order = np.argsort(-scores, kind="stable")
    last, group = _ties(scores[order])
    drawn = counts[:, order]
    right = (drawn * truth[order]).cumsum(axis=1)[:, last[group]]
    seen = drawn.cumsum(axis=1)[:, last[group]]
    with np.errstate(invalid="ignore"):
        return np.where(seen > 0, right / np.maximum(seen, 1), 0.0), right / right[:, -1:]


def _ties(ordered: Values) -> tuple[Places, Places]:
    """Return the last place (g,) of every group of equal scores in sorted ones (n,), and the group (n,) of each."""
    begins = np.append(False, ordered[1:] != ordered[:-1])
    return np.flatnonzero(np.append(begins[1:], True)), np.cumsum(begins)
