"""Augmentation for training with labels: RandAugment, random erasing, mixup and cutmix, every one drawn by a key.

timm's RandAugment and erasing draw from the global generators of Python, numpy and torch, which are set from the key
for as long as they run. Mixing takes two images that are at hand, and not the rest of a batch: what an image is mixed
with depends on its position in the run alone, not on the number of ranks or micro-batches.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.data.views import Crop, normalize, statistics


@contextmanager
def seeded(at: Key) -> Iterator[None]:
    """Run the body with the generators of Python, numpy and torch (CPU) set from `at`; they are put back after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(at.integer())
    np.random.seed(at.integer() % 2**32)
    # Not `torch.manual_seed`, which in a worker leaves a note for every accelerator at each call.
    torch.default_generator.manual_seed(at.integer())
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def rand_augment(image: Tensor, policy: str, normalization: str, at: Key) -> Tensor:
    """Return uint8 (3, H, W) after timm's RandAugment by a `policy` such as "rand-m9-mstd0.5-inc1"; "" changes nothing.

    Pixels from beyond the image have the mean colour of `normalization`; resampling is bicubic.

    Raises:
        UserError: timm does not know the policy.
    """
    if not policy:
        return image
    transform = _rand_augment(policy, normalization, min(image.shape[1:]))
    with seeded(at.child("randaugment")):
        changed = transform(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@functools.lru_cache(maxsize=16)
def _rand_augment(policy: str, normalization: str, size: int) -> Callable[[PIL.Image.Image], PIL.Image.Image]:
    mean = tuple(round(255 * channel) for channel in statistics(normalization)[0])
    # As timm's loader sets it up: translations reach 45 % of the image.
    options = {"translate_const": int(0.45 * size), "img_mean": mean, "interpolation": PIL.Image.Resampling.BICUBIC}
    try:
        transform = rand_augment_transform(policy, options)
    except (AssertionError, ValueError, KeyError, IndexError):
        raise UserError(
            f"timm knows no RandAugment policy '{policy}': write one such as 'rand-m9-mstd0.5-inc1', or '' for none."
        ) from None
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = functools.partial(_some_bits, operation.level_fn)
    found: Callable[[PIL.Image.Image], PIL.Image.Image] = transform
    return found


def _some_bits(level: Callable[..., tuple[int]], magnitude: float, options: dict[str, Any]) -> tuple[int]:
    # At the end of its range timm asks to keep 0 bits, which Pillow refuses.
    return (max(1, level(magnitude, options)[0]),)


def random_erase(image: Tensor, probability: float, at: Key) -> Tensor:
    """Return a normalised image (3, H, W), with `probability` with a box of N(0, 1) noise in it (Zhong et al. 2020)."""
    erased = image.clone()
    with seeded(at.child("erase")):
        erase: Callable[[Tensor], Tensor] = RandomErasing(probability, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
        erase(erased)
    return erased


@dataclass(frozen=True)
class Augment:
    """Encoded image -> a random view of it, normalised: crop and flip, RandAugment, random erasing.

    Raises:
        UserError: timm does not know the policy, or `erase` is no probability.
    """

    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the policy; empty: none."""
    erase: float = 0.25
    """Probability of random erasing."""

    def __post_init__(self) -> None:
        if self.rand_augment:
            _rand_augment(self.rand_augment, "imagenet", 224)
        if not 0 <= self.erase <= 1:
            raise UserError(f"augment.erase is a probability from 0 to 1, not {self.erase}.")

    def __call__(self, data: bytes, size: int, normalization: str, at: Key) -> Tensor:
        """Return fp32 (3, size, size); BrokenImage where `data` cannot be decoded."""
        image = rand_augment(self.crop(data, size, at), self.rand_augment, normalization, at)
        return random_erase(normalize(image[None], normalization)[0], self.erase, at)


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of two images and their targets.

    The share of the first is drawn from Beta(x, x) for every image by itself, where the sources draw one a batch.

    Raises:
        UserError: a number is out of its range.
    """

    mixup: float = 0.8
    """x of mixup; 0: none."""
    cutmix: float = 1.0
    """x of cutmix; 0: none."""
    switch: float = 0.5
    """Probability of cutmix where both are on."""
    probability: float = 1.0
    """Probability that an image is mixed at all."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"mixing.{name} is the x of Beta(x, x), or 0 for none, not {getattr(self, name)}.")
        for name in ("switch", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mixing.{name} is a probability from 0 to 1, not {getattr(self, name)}.")

    @property
    def is_on(self) -> bool:
        """True if any image is mixed."""
        return bool(self.mixup or self.cutmix) and self.probability > 0

    def draws(self, at: Key) -> bool:
        """Return whether the image at `at` is mixed with another one."""
        return self.is_on and bool(at.child("mixes").generator().random() < self.probability)

    def __call__(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], at: Key) -> tuple[Tensor, Tensor]:
        """Mix (image (3, H, W), target (C,)) with another such pair, fp32."""
        rng = at.child("mix").generator()
        pastes = bool(self.cutmix) and (not self.mixup or rng.random() < self.switch)
        alpha = self.cutmix if pastes else self.mixup
        share = float(rng.beta(alpha, alpha))
        if pastes:
            image, share = _paste(first[0], second[0], share, rng)
        else:
            image = share * first[0] + (1 - share) * second[0]
        return image, share * first[1] + (1 - share) * second[1]


def _paste(image: Tensor, other: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Return `image` with a box of `other` that takes 1 - share of its area, and the share that is really left.

    The box has the image's aspect ratio, its middle lies anywhere, and what falls outside of the image is cut off.
    """
    height, width = image.shape[1:]
    side = float(np.sqrt(1 - share))
    down, right = int(rng.integers(height)), int(rng.integers(width))
    top, left = max(0, down - int(height * side) // 2), max(0, right - int(width * side) // 2)
    bottom = min(height, down + (int(height * side) + 1) // 2)
    end = min(width, right + (int(width * side) + 1) // 2)
    mixed = image.clone()
    mixed[:, top:bottom, left:end] = other[:, top:bottom, left:end]
    return mixed, 1 - (bottom - top) * (end - left) / (height * width)
