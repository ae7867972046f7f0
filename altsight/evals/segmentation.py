"""Semantic segmentation: logits of a whole image from sliding windows, and the mean IoU over classes (D6)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from altsight.core.dist import gather_objects, world
from altsight.core.errors import UserError
from altsight.data.mask_views import fitted, mean_colour, padded, scaled
from altsight.data.segmentation import IGNORED, Masked
from altsight.evals.base import Preprocess, Result
from altsight.evals.bootstrap import Interval, statistic_interval
from altsight.nn.dense import resize
from altsight.train.log import progress_bar

Counts = npt.NDArray[Any]
Logits = Callable[[Tensor], Tensor]
"""Windows uint8 (n, 3, S, S) -> logits (n, K, S, S)."""

WINDOWS = 8
"""Windows that are computed at a time."""
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Sizes of the multi-scale test (mmsegmentation's), each also mirrored."""


@dataclass(frozen=True)
class Windows:
    """How an image of any size is predicted: scaled so that its shorter side is `size`, then in overlapping windows.

    The stride is two thirds of the window (341 of 512, 426 of 640). multi_scale: mean of the probabilities at `SCALES`
    and of the mirrored image at each.
    """

    size: int
    normalization: str
    multi_scale: bool = False

    def probabilities(self, logits: Logits, image: Tensor) -> Tensor:
        """Return the mean probabilities fp32 (K, H, W) of an image uint8 (3, H, W)."""
        views = [(scale, flip) for scale in SCALES for flip in (False, True)] if self.multi_scale else [(1.0, False)]
        total: Tensor | None = None
        for scale, flip in views:
            sized = scaled(image, fitted(image.shape[1:], self.size, scale))
            whole = self._slide(logits, sized.flip(-1) if flip else sized)
            found = resize(whole.flip(-1) if flip else whole, image.shape[1:])[0].softmax(dim=0)
            total = found if total is None else total + found
        assert total is not None, "there is at least one scale"
        return total / len(views)

    def preprocess(self) -> Preprocess:
        """Return what names this preprocessing."""
        how = f"bilinear, windows, {'many scales' if self.multi_scale else 'one scale'}"
        return Preprocess(self.size, self.normalization, interpolation=how)

    def _slide(self, logits: Logits, image: Tensor) -> Tensor:
        """Return the logits (1, K, H, W) of an image uint8 (3, H, W): the mean over the windows that see a pixel."""
        height, width = image.shape[1:]
        image = padded(image, self.size, mean_colour(self.normalization))
        places = [(top, left) for top in self._starts(image.shape[1]) for left in self._starts(image.shape[2])]
        total: Tensor | None = None
        seen = torch.zeros(image.shape[1:])
        for start in range(0, len(places), WINDOWS):
            some = places[start : start + WINDOWS]
            cut = torch.stack([image[:, top : top + self.size, left : left + self.size] for top, left in some])
            for (top, left), found in zip(some, logits(cut).float().cpu(), strict=True):
                if total is None:
                    total = torch.zeros(len(found), *image.shape[1:])
                total[:, top : top + self.size, left : left + self.size] += found
                seen[top : top + self.size, left : left + self.size] += 1
        assert total is not None, "there is at least one window"
        return (total / seen)[None, :, :height, :width]

    def _starts(self, side: int) -> list[int]:
        """Return where windows begin along a side: every two thirds of a window, the last one at the far end."""
        stride = max(self.size * 2 // 3, 1)
        steps = -(-(side - self.size) // stride)
        return [min(step * stride, side - self.size) for step in range(steps + 1)]


def overlaps(predicted: Tensor, mask: Tensor, classes: int) -> Counts:
    """Return (3, K) pixels of each class: hit, in the mask, predicted; pixels that are `IGNORED` count nowhere."""
    counted = mask != IGNORED
    truth, guess = mask[counted].long(), predicted[counted].long()
    parts = (truth[truth == guess], truth, guess)
    return np.stack([torch.bincount(part, minlength=classes).numpy() for part in parts])


def ious(counts: Counts) -> npt.NDArray[np.float64]:
    """Return the IoU (..., K) of every class from `overlaps` (..., 3, K); NaN for one that is nowhere."""
    hit, truth, guess = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = truth + guess - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def mean_iou(counts: Counts) -> Interval:
    """Return the mean over classes of the IoU over all images, and its interval over resampled images.

    counts: `overlaps` (n, 3, K) of every image. Classes that are nowhere, in mask or prediction, do not count.
    """
    rows = counts.reshape(len(counts), -1)
    return statistic_interval(
        lambda drawn: np.nanmean(ious((drawn @ rows).reshape(-1, *counts.shape[1:])), axis=1), len(counts)
    )


def pixel_accuracy(counts: Counts) -> Interval:
    """Return the share of labelled pixels that are right, and its interval over resampled images; see `mean_iou`."""
    hits, pixels = counts[:, 0].sum(axis=1), counts[:, 1].sum(axis=1)
    return statistic_interval(lambda drawn: (drawn @ hits) / np.maximum(drawn @ pixels, 1), len(counts))


def score(logits: Logits, data: Masked, windows: Windows, **fields: Any) -> list[Result]:
    """Return mean IoU, with that of every class in `extra`, and pixel accuracy of `logits` on `data`.

    The images are shared out among the ranks. fields: task, evaluator, feature_point and more of the results.

    Raises:
        UserError: no pixel of the masks is labelled.
    """
    place = world()
    rows: list[tuple[int, bytes, Counts]] = []
    with progress_bar(transient=True) as bar:
        task = bar.add_task("predicting masks", total=len(data), note="")
        for i in range(place.rank, len(data), place.size):
            image, mask = data.sample(i)
            with torch.inference_mode():
                predicted = windows.probabilities(logits, image).argmax(dim=0)
            digest = hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes()).digest()
            rows.append((i, digest, overlaps(predicted, mask, len(data.classes))))
            bar.advance(task, place.size)
    whole = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row[0])
    counts = np.stack([count for _, _, count in whole])
    if not counts[:, 1].sum():
        raise UserError(f"no pixel of the {data.split} masks has a class: look at the masks, and --reduce-zero-label.")
    found, right, each = mean_iou(counts), pixel_accuracy(counts), ious(counts.sum(axis=0))
    known = Result(
        metric="miou",
        value=found.value,
        low=found.low,
        high=found.high,
        n=len(counts),
        split=data.split,
        preprocess=windows.preprocess().hash(),
        data=hashlib.sha256(b"".join(digest for _, digest, _ in whole)).hexdigest()[:12],
        **fields,
    )
    by_class = {
        name: None if np.isnan(iou) else round(float(iou), 6) for name, iou in zip(data.classes, each, strict=True)
    }
    return [
        replace(known, extra=known.extra | {"iou": by_class}),
        replace(known, metric="pixel_accuracy", value=right.value, low=right.low, high=right.high),
    ]
