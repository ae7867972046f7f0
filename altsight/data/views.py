"""Views of an image: crops and masks in the worker (each a function of a key), normalisation on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import Key
from altsight.data.decode import MAX_PIXELS, Box, BrokenImage, decode, open_picture

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per channel."""
NORMALIZATIONS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cc12m": ((0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307)),
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

    def box(self, height: int, width: int, at: Key) -> Box:
        """Return the part of an image of `height` x `width` pixels that the crop keeps."""
        for keep, slant, down, right in at.child("crop").generator().random((10, 4)).tolist():
            area = height * width * (self.scale[0] + keep * (self.scale[1] - self.scale[0]))
            aspect = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** slant
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, data: bytes, size: int, at: Key) -> Tensor:
        """Decode `data` and return one random view, uint8 (3, size, size).

        Raises:
            BrokenImage: the bytes cannot be decoded.
        """
        if _known is None:
            return crops(data, [(self, size, at)])[0]
        name = (self, id(data), size, at)
        if name not in _known:
            _known[name] = (crops(data, [(self, size, at)])[0], data)
        return _known[name][0]

    def needs(self, size: int) -> int:
        """Return the side at which `finish` needs the pixels of the box for a view of side `size`."""
        return size

    def finish(self, part: Tensor, size: int, at: Key) -> Tensor:
        """Resize the pixels of the box to uint8 (3, size, size), and flip them or not."""
        view = _resize(part, size, size)
        return view.flip(-1) if self.flips(at) else view

    def flips(self, at: Key) -> bool:
        """Return whether the view at `at` is mirrored: text that names a side has to follow."""
        return self.flip and bool(at.child("flip").generator().random() < 0.5)


_known: dict[tuple[Crop, int, int, Key], tuple[Tensor, bytes]] | None = None
"""Views that were made, with the bytes that they are of, so that the bytes' ids do not pass to others."""


@contextmanager
def remember_views() -> Iterator[None]:
    """Within the body, a crop that is asked again for a view of the same bytes returns the very same tensor."""
    global _known
    before, _known = _known, {}
    try:
        yield
    finally:
        _known = before


def crops(data: bytes, views: Sequence[tuple[Crop, int, Key]]) -> list[Tensor]:
    """Decode `data` once and return a random view uint8 (3, size, size) for every (crop, size, key).

    The boxes are drawn in the image at its full size. A JPEG is then decoded at the smallest scale at which no box has
    to be enlarged that would not be otherwise, and a box is moved to whole pixels of that scale: by half a pixel of its
    view at most.

    Raises:
        BrokenImage: the bytes cannot be decoded.
    """
    picture = open_picture(data)
    boxes = [crop.box(picture.height, picture.width, at) for crop, _, at in views]
    ratio = min(min(box[2:]) / crop.needs(size) for box, (crop, size, _) in zip(boxes, views, strict=True))
    parts = picture.cut(boxes, picture.reduction(ratio))
    return [crop.finish(part, size, at) for part, (crop, size, at) in zip(parts, views, strict=True)]


def _resize(image: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    # What torchvision's resize calls for uint8 on the CPU, without a tenth of the time spent on the way there.
    return F.interpolate(image[None], (height, width), mode=mode, antialias=True)[0]


def center_crop(
    data: bytes, size: int, crop_ratio: float = 1.0, interpolation: str = "bicubic", squash: bool = False
) -> Tensor:
    """Decode `data`, resize its shorter side to size / crop_ratio and cut the centre: uint8 (3, size, size).

    Decoded in full, and pixel for pixel what torchvision makes of it: tests are compared with other people's.

    Args:
        interpolation: bicubic or bilinear.
        squash: resize both sides to size / crop_ratio, whatever the aspect ratio.

    Raises:
        BrokenImage: the bytes cannot be decoded, or to a strip so thin that it would be resized to a huge image.
    """
    side = round(size / crop_ratio)
    image = decode(data)
    shorter = min(image.shape[1:])
    height, width = (side if squash else int(side * length / shorter) for length in image.shape[1:])
    if height * width > MAX_PIXELS:
        raise BrokenImage(f"{image.shape[1]} x {image.shape[2]} pixels are too thin a strip")
    image = _resize(image, height, width, interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


def random_keep(patches: int, ratio: float, at: Key) -> Tensor:
    """Return the sorted indices of the int(patches * (1 - ratio)) patches that stay visible, (K,) int64.

    Uniform over subsets (MAE's argsort of noise). Sorted, since the encoder is indifferent to the order of its
    tokens: their positions travel with them.
    """
    kept = int(patches * (1 - ratio))
    return torch.from_numpy(at.child("mask").generator().permutation(patches)[:kept].copy()).sort().values


def statistics(name: str) -> Statistics:
    """Return mean and standard deviation of a normalization: a name in `NORMALIZATIONS`, or "m,m,m/s,s,s".

    Raises:
        UserError: it is neither.
    """
    if name in NORMALIZATIONS:
        return NORMALIZATIONS[name]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in name.split("/"))
        (a, b, c), (d, e, f) = mean, std
    except ValueError:
        near = did_you_mean(name, NORMALIZATIONS)
        raise UserError(f"no normalization '{name}' (nor is it MEAN,MEAN,MEAN/STD,STD,STD).{near}") from None
    return (a, b, c), (d, e, f)


def normalization_of(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return what `statistics` reads as `mean` and `std`, by name where it has one."""
    wanted = (tuple(mean), tuple(std))
    known = next((name for name, value in NORMALIZATIONS.items() if value == wanted), None)
    return known or "/".join(",".join(map(str, part)) for part in wanted)


def normalize(images: Tensor, name: str) -> Tensor:
    """Map uint8 (B, 3, H, W), or fp32 in [0, 1], to the mean and deviation of the normalization `name`."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in statistics(name))
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - mean) / std


def low_frequency_crop(images: Tensor, size: int) -> Tensor:
    """Return images (B, C, size, size) that hold the low frequencies of `images` (B, C, H, H); size even, fp32.

    The centred size x size window of the shifted spectrum (frequencies -size/2 ... size/2 - 1), transformed back and
    scaled by (size / H)^2, so that the mean stays (EfficientTrain, Wang et al. 2023; specification 3.2).
    """
    full = images.shape[-1]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.float()), dim=(-2, -1))
    start = full // 2 - size // 2
    window = spectrum[..., start : start + size, start : start + size]
    small = torch.fft.ifft2(torch.fft.ifftshift(window, dim=(-2, -1))).real
    return small * (size / full) ** 2


def to_unit(images: Tensor, name: str) -> Tensor:
    """Undo `normalize`: map fp32 (B, 3, H, W) back to [0, 1]."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in statistics(name))
    return images * std + mean
