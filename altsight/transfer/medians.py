"""Metrics of many prompt sets on the same slides: their median, quartiles, and its interval over slides.

Specification 1.5. The released code has no AUC; ours is that of softmax(scale x pooled score), one class against the
rest, averaged over classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score
from torch import Tensor

from altsight.core.rng import key
from altsight.evals.bootstrap import LEVEL, RESAMPLES

METRICS = ("accuracy", "balanced_accuracy", "auc")


@dataclass(frozen=True)
class Spread:
    """A metric over prompt sets. low, high: 95 % interval of the median over resampled slides; None for the AUC."""

    values: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def median(self) -> float:
        """Return the median over sets."""
        return float(np.median(self.values))

    def quartiles(self) -> dict[str, float]:
        """Return the least value, the quartiles and the largest."""
        names = ("min", "q1", "median", "q3", "max")
        found = np.quantile(self.values, [0, 0.25, 0.5, 0.75, 1])
        return dict(zip(names, map(float, found), strict=True))


def spreads(scores: Tensor, labels: npt.NDArray[np.int64], scale: float, seed: int) -> dict[str, Spread]:
    """Return each of `METRICS` over the prompt sets.

    The AUC is left out where a class has no slide, as it is not defined there.

    Args:
        scores: (sets, slides, C) pooled cosines. labels: (slides,) class ids.
        scale: what cosines are multiplied with before the softmax.
    """
    predicted = scores.argmax(dim=2).numpy()
    hits = predicted == labels
    together = np.zeros_like(labels)
    found = {
        "accuracy": Spread(
            tuple(float(accuracy_score(labels, p)) for p in predicted), *median_interval(hits, together, seed)
        ),
        "balanced_accuracy": Spread(
            tuple(_balanced(labels, p) for p in predicted), *median_interval(hits, labels, seed)
        ),
    }
    if len(np.unique(labels)) == scores.shape[2]:
        chances = (scores.double() * scale).softmax(dim=2).numpy()
        found["auc"] = Spread(tuple(_auc(labels, c) for c in chances), None, None)
    return found


def median_interval(hits: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median over sets of the mean over groups of the hit rate.

    Slides are resampled within each group, the same ones for all sets.

    Args:
        hits: (sets, slides). groups: (slides,), the classes for a balanced accuracy, all equal for a plain one.
    """
    draw = key(seed, 0, "bootstrap").generator()
    names = np.unique(groups)
    rates = np.zeros((RESAMPLES, len(hits)))
    for name in names:
        part = hits[:, groups == name].astype(np.float64)
        counts = draw.multinomial(part.shape[1], np.full(part.shape[1], 1 / part.shape[1]), size=RESAMPLES)
        rates += counts @ part.T / part.shape[1] / len(names)
    low, high = np.quantile(np.median(rates, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _balanced(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Return the mean recall of the classes that occur."""
    return float(recall_score(labels, predicted, labels=np.unique(labels), average="macro"))


def _auc(labels: npt.NDArray[np.int64], chances: npt.NDArray[np.float64]) -> float:
    if chances.shape[1] == 2:
        return float(roc_auc_score(labels, chances[:, 1]))
    return float(roc_auc_score(labels, chances, multi_class="ovr", average="macro"))
