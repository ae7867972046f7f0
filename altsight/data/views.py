"""Views of an image: crops and masks in the worker (each a function of a key), normalisation on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from altsight.core.rng import Key
from altsight.data.decode import decode

NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Name -> (mean, standard deviation) per channel, for pixels in [0, 1] (specification 0.3, item 5)."""


@dataclass(frozen=True)
class Crop:
    """Random resized crop and flip, with torchvision's sampling of the box.

    scale: range of the share of the image's area that the crop keeps. ratio: range of its aspect ratio.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def box(self, height: int, width: int, at: Key) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the crop in an image of `height` x `width` pixels."""
        draw = at.child("crop").generator()
        for _ in range(10):
            area = height * width * draw.uniform(*self.scale)
            aspect = math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
                return int(top), int(left), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, data: bytes, size: int, at: Key) -> Tensor:
        """Decode `data` and return one random view, uint8 (3, size, size).

        Raises:
            BrokenImage: the bytes cannot be decoded.
        """
        # The smallest crop keeps scale[0] of the area, its shorter side sqrt(slimmest) of that of a square crop: decode
        # no larger than it takes for this crop to fill `size`.
        slimmest = min(self.ratio[0], 1 / self.ratio[1], 1.0)
        image = decode(data, least=math.ceil(size / math.sqrt(self.scale[0] * slimmest)))
        top, left, h, w = self.box(image.shape[1], image.shape[2], at)
        view = F.resized_crop(image, top, left, h, w, [size, size], InterpolationMode.BICUBIC, antialias=True)
        if self.flip and at.child("flip").generator().random() < 0.5:
            view = F.horizontal_flip(view)
        return view


def center_crop(data: bytes, size: int, crop_ratio: float = 1.0) -> Tensor:
    """Decode `data`, resize its shorter side to size / crop_ratio (bicubic) and cut the centre: uint8 (3, size, size).

    Raises:
        BrokenImage: the bytes cannot be decoded.
    """
    side = round(size / crop_ratio)
    image = decode(data, least=side)
    return F.center_crop(F.resize(image, [side], InterpolationMode.BICUBIC, antialias=True), [size, size])


def random_keep(patches: int, ratio: float, at: Key) -> Tensor:
    """Return the sorted indices of the int(patches * (1 - ratio)) patches that stay visible, (K,) int64.

    Uniform over subsets (MAE's argsort of noise). Sorted, since the encoder is indifferent to the order of its
    tokens: their positions travel with them.
    """
    kept = int(patches * (1 - ratio))
    return torch.from_numpy(at.child("mask").generator().permutation(patches)[:kept].copy()).sort().values


def normalize(images: Tensor, name: str) -> Tensor:
    """Map uint8 (B, 3, H, W) to fp32 with the mean and standard deviation of `NORMALIZATIONS[name]`."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in NORMALIZATIONS[name])
    return (images.float() / 255 - mean) / std
