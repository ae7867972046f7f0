"""Large-scale jitter: an image with its boxes and masks at a random size, cut and padded to a fixed one.

Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation"; as in ViTDet
(specification D7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.coco import Instance
from altsight.data.decode import Box, BrokenImage, open_picture
from altsight.data.views import statistics


@dataclass(frozen=True)
class DetectPrepare:
    """Document -> image: uint8 (3, S, S); valid: (2,) height and width of the part of it that is not padding;
    boxes: fp32 (most, 4) and labels: int64 (most,), 0 beyond the last; masks: uint8 (most, S, S / 8), 8 pixels a byte.

    Large-scale jitter (Ghiasi et al. 2021): the image at a random size, a random window of S x S pixels or less of it,
    and padding of the mean colour on the right and below. BrokenImage where its size is not that of the annotations.
    """

    size: int
    normalization: str
    masks: bool
    jitter: tuple[float, float]
    flip: bool
    most: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        picture = open_picture(document.images[0])
        if document.meta["size"] != (picture.height, picture.width):
            rows, columns = document.meta["size"]
            raise BrokenImage(f"{picture.height} x {picture.width} pixels, annotated as {rows} x {columns}")
        draw = at.child("jitter").generator()
        ratio = draw.uniform(*self.jitter) * self.size / max(picture.height, picture.width)
        window, height, width = _window(picture.height, picture.width, self.size, ratio, draw)
        (part,) = picture.cut([window], picture.reduction(min(window[2] / height, window[3] / width)))
        seen = F.interpolate(part[None], (height, width), mode="bilinear", antialias=True)[0]
        mirrored = self.flip and bool(draw.random() < 0.5)
        things: Sequence[Instance] = document.meta["instances"]
        boxes, labels, masks = self._targets(things, (picture.height, picture.width), window, (height, width))
        if mirrored:
            seen = seen.flip(-1)
            masks = masks.flip(-1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        example = {"image": padded(seen, self.size, self.normalization), "valid": torch.tensor([height, width])}
        return example | self._filled(boxes, labels, masks)

    def _targets(
        self, things: Sequence[Instance], whole: tuple[int, int], window: Box, seen: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (n, 4), labels (n,) and masks (n, *seen) of what is seen in `window`, largest first."""
        labels = torch.tensor([thing.label + 1 for thing in things], dtype=torch.int64)
        if self.masks:
            masks = _windowed([thing.mask(*whole) for thing in things], window, seen)
            kept = masks.flatten(1).any(dim=1)
            masks, boxes = masks[kept], boxes_of(masks[kept])
        else:
            masks = torch.zeros(0, *seen, dtype=torch.bool)
            boxes = _clipped([thing.box for thing in things], window, seen)
            kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
            boxes = boxes[kept]
        order = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True, stable=True)[: self.most]
        return boxes[order], labels[kept][order], masks[order] if self.masks else masks

    def _filled(self, boxes: Tensor, labels: Tensor, masks: Tensor) -> Example:
        """Return targets of a fixed size, so that images can be stacked."""
        count, most = len(labels), self.most
        example = {"boxes": F.pad(boxes, (0, 0, 0, most - count)), "labels": F.pad(labels, (0, most - count))}
        if self.masks:
            rows = F.pad(masks, (0, self.size - masks.shape[2], 0, self.size - masks.shape[1], 0, most - count))
            example["masks"] = torch.from_numpy(np.packbits(rows.numpy(), axis=-1))
        return example


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width of an image whose longer side is resized to `size`."""
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def padded(image: Tensor, size: int, normalization: str) -> Tensor:
    """Return uint8 (3, size, size): the image, and the mean colour on the right and below."""
    mean = torch.tensor([round(255 * channel) for channel in statistics(normalization)[0]], dtype=torch.uint8)
    whole = mean.view(3, 1, 1).repeat(1, size, size)
    whole[:, : image.shape[1], : image.shape[2]] = image
    return whole


def boxes_of(masks: Tensor) -> Tensor:
    """Return the boxes (n, 4) of masks (n, H, W), none of them empty: left, top, right, bottom, as edges of pixels."""
    boxes = torch.zeros(len(masks), 4)
    for row, mask in enumerate(masks):
        rows, columns = mask.any(dim=1).nonzero().squeeze(1), mask.any(dim=0).nonzero().squeeze(1)
        boxes[row] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return boxes


def unpacked(masks: Tensor, size: int) -> Tensor:
    """Return masks (n, H, size), 0 or 1, from bytes (n, H, ceil(size / 8)) whose highest bit is the leftmost pixel."""
    bits = torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return ((masks.unsqueeze(-1) >> bits) & 1).flatten(2)[..., :size]


def _window(height: int, width: int, size: int, ratio: float, draw: np.random.Generator) -> tuple[Box, int, int]:
    """Return a random part of an image that is at most `size` on a side once it is resized by `ratio`, and its size."""
    rows, columns = (min(side, max(1, round(size / ratio))) for side in (height, width))
    top, left = int(draw.integers(height - rows + 1)), int(draw.integers(width - columns + 1))
    seen = tuple(min(size, max(1, round(side * ratio))) for side in (rows, columns))
    return (top, left, rows, columns), seen[0], seen[1]


def _windowed(masks: list[Any], window: Box, seen: tuple[int, int]) -> Tensor:
    """Return the window of every mask, resized: bool (n, *seen)."""
    top, left, height, width = window
    if not masks:
        return torch.zeros(0, *seen, dtype=torch.bool)
    parts = torch.from_numpy(np.stack([mask[top : top + height, left : left + width] for mask in masks])).float()
    return F.interpolate(parts[None], seen, mode="bilinear", antialias=True)[0] >= 0.5


def _clipped(boxes: list[tuple[float, float, float, float]], window: Box, seen: tuple[int, int]) -> Tensor:
    """Return boxes (left, top, width, height) as edges (n, 4) in the resized window, clipped to it."""
    top, left, height, width = window
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    edges[:, 2:] += edges[:, :2]
    down, right = seen[0] / height, seen[1] / width
    moved = (edges - torch.tensor([left, top, left, top])) * torch.tensor([right, down, right, down])
    limit = torch.tensor([seen[1], seen[0]] * 2, dtype=torch.float32)
    return torch.minimum(moved.clamp_min(0), limit)
