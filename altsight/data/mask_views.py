"""Random views of an image together with its mask: mmsegmentation's, as UPerNet and DenseCLIP train on (D6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_hue

from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.decode import decode
from altsight.data.segmentation import IGNORED, check_size
from altsight.data.views import statistics

LONGER = 4
"""An image is scaled so that its shorter side is that of the view and its longer one at most this many of it."""
TRIES = 10
"""Crops that are drawn until one shows enough of a second class."""


@dataclass(frozen=True)
class MaskView:
    """How training views are drawn: scaled, cropped, mirrored, coloured."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on the size that a test image is scaled to."""
    most_of_one: float = 0.75
    """Largest share of a crop's labelled pixels that are of one class; above it another crop is drawn."""
    flip: bool = True
    photometric: bool = True
    """Brightness, contrast, saturation and hue, each in half of the views (SSD's distortion)."""

    def __call__(self, image: Tensor, mask: Tensor, size: int, fill: Tensor, at: Key) -> tuple[Tensor, Tensor]:
        """Return a view uint8 (3, size, size) and its mask uint8 (size, size).

        Args:
            image: uint8 (3, H, W). mask: uint8 (H, W).
            fill: uint8 (3,), the colour beyond the border of an image that is smaller than the view.
        """
        draw = at.child("view").generator()
        height, width = fitted(image.shape[1:], size, float(draw.uniform(*self.scale)))
        mask = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
        for _ in range(TRIES):
            top, left = (int(draw.integers(max(side - size, 0) + 1)) for side in (height, width))
            cut = mask[top : top + size, left : left + size]
            if self._is_varied(cut):
                break
        image = scaled(image, (height, width))[:, top : top + size, left : left + size]
        if self.photometric:
            image = distorted(image, at)
        image = padded(image, size, fill)
        cut = F.pad(cut, (0, size - cut.shape[1], 0, size - cut.shape[0]), value=IGNORED)
        flip = self.flip and bool(draw.random() < 0.5)
        return (image.flip(-1), cut.flip(-1)) if flip else (image, cut)

    def _is_varied(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask[mask != IGNORED])
        return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.most_of_one


@dataclass(frozen=True)
class MaskPrepare:
    """Document -> image: uint8 (3, size, size); mask: uint8 (size, size). normalization: whose mean pads an image."""

    view: MaskView
    size: int
    normalization: str

    def __call__(self, document: Document, at: Key) -> Example | None:
        image, mask = decode(document.images[0]), document.meta["mask"]
        check_size(image, mask, document.id)
        image, mask = self.view(image, mask, self.size, mean_colour(self.normalization), at)
        return {"image": image, "mask": mask}


def mean_colour(normalization: str) -> Tensor:
    """Return the colour that `normalization` maps to zero, uint8 (3,)."""
    return (torch.tensor(statistics(normalization)[0]) * 255).round().to(torch.uint8)


def fitted(shape: torch.Size, size: int, factor: float = 1.0) -> tuple[int, int]:
    """Return height and width of an image of `shape` (H, W) whose shorter side becomes `size` times `factor`.

    The longer side becomes at most `LONGER` times that.
    """
    shorter, longer = min(shape), max(shape)
    ratio = factor * min(size / shorter, LONGER * size / longer)
    height, width = (max(round(side * ratio), 1) for side in shape)
    return height, width


def scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image uint8 (3, H, W) at another size, bilinearly."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def padded(image: Tensor, size: int, fill: Tensor) -> Tensor:
    """Return an image uint8 (3, H, W) with `fill` to the right and below, so that both sides are `size` or more."""
    height, width = (max(side, size) for side in image.shape[1:])
    whole = fill.view(3, 1, 1).expand(3, height, width).clone()
    whole[:, : image.shape[1], : image.shape[2]] = image
    return whole


def distorted(image: Tensor, at: Key) -> Tensor:
    """Return an image uint8 (3, H, W) in other colours: SSD's photometric distortion with mmsegmentation's ranges.

    Brightness is moved by up to 32 of 255, contrast and saturation are scaled by 0.5 to 1.5, hue is turned by up to a
    tenth of the circle; contrast comes before or after the colours.
    """
    draw = at.child("colour").generator()
    does = draw.random(5) < 0.5
    shift, contrast, saturation, hue = (float(x) for x in draw.uniform((-32, 0.5, 0.5, -0.1), (32, 1.5, 1.5, 0.1)))
    x = image.float()
    if does[0]:
        x = (x + shift).clamp(0, 255)
    if does[1] and does[4]:
        x = (x * contrast).clamp(0, 255)
    if does[2]:
        x = _saturated(x, saturation)
    if does[3]:
        x = adjust_hue(x / 255, hue) * 255
    if does[1] and not does[4]:
        x = (x * contrast).clamp(0, 255)
    return x.round().to(torch.uint8)


def _saturated(x: Tensor, factor: float) -> Tensor:
    """Scale the saturation of HSV by `factor`, up to its maximum: value and hue stay."""
    value = x.amax(dim=0, keepdim=True)
    most = value / (value - x.amin(dim=0, keepdim=True)).clamp(min=1e-6)
    return value - most.clamp(max=factor) * (value - x)
