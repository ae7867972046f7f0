"""Preparation that changes in the course of a run: smaller pictures and weaker augmentation at first, patch dropout.

All of it works around a method's own `Prepare`, so it serves every method. Which stage a sample is in depends on its
position alone, so neither ranks, workers nor restarts change it.
"""

from __future__ import annotations

import bisect
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.loader import Prepare
from altsight.data.views import NORMALIZATIONS, Crop, random_keep

Shrink = Literal["low_frequency", "resize"]
"""How a picture becomes smaller: the encoder crops its spectrum on the device, or it is resized here (Lanczos)."""


@dataclass(frozen=True)
class Staged:
    """A preparation for every stage of a run; `starts` are the first positions of the stages, the first one 0."""

    starts: tuple[int, ...]
    prepares: tuple[Prepare, ...]

    def __call__(self, document: Document, at: Key) -> Example | None:
        return self.prepares[bisect.bisect_right(self.starts, at.position) - 1](document, at)


@dataclass(frozen=True)
class PatchDropout:
    """What `prepare` yields, and visible: (K,) int64, the patches of the picture that are encoded (FLIP).

    Uniform over subsets, int(patches * (1 - ratio)) of them (Li et al. 2023, arXiv 2212.00794).
    """

    prepare: Prepare
    patches: int
    ratio: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.prepare(document, at)
        if example is not None:
            example["visible"] = random_keep(self.patches, self.ratio, at.child("patch dropout"))
        return example


@dataclass(frozen=True)
class StageCrop(Crop):
    """A crop that yields, where a method asks for views of side `stage`, what the stage makes of views of side `full`.

    The box, and the view at full size, are those of the crop without stages. It is augmented at full size, then
    resized, or left at full size for the encoder to crop its spectrum. Views of another side (the local ones of
    multi-crop) are left alone.
    """

    full: int = 0
    stage: int = 0
    shrink: Shrink = "low_frequency"
    magnitude: int | None = None
    """Of RandAugment; None: none."""

    def needs(self, size: int) -> int:
        """Return the side at which the pixels of the box are needed."""
        return self.full if size == self.stage else size

    def finish(self, part: Tensor, size: int, at: Key) -> Tensor:
        """Return the view of the box `part`: uint8 (3, full, full) under low_frequency, else (3, size, size)."""
        view = super().finish(part, self.needs(size), at)
        if size != self.stage:
            return view
        if self.magnitude is not None:
            view = rand_augment(view, self.magnitude, at)
        return lanczos(view, size) if self.shrink == "resize" and size != self.full else view


def stage_crop(crop: Crop, full: int, stage: int, shrink: Shrink, magnitude: int | None) -> StageCrop:
    """Return `crop` as it is in a stage with views of side `stage`."""
    return StageCrop(crop.scale, crop.ratio, crop.flip, full, stage, shrink, magnitude)


def with_own_crops(prepare: Any, full: int, stage: int) -> Any:
    """Return `prepare` with the crops that a method has of its own yielding full-size views for the spectrum crop.

    They are found in the fields of the preparation, however deep, since they are not those that a study hands out.
    Methods that draw such views augment them themselves, so they get no RandAugment.
    """
    if isinstance(prepare, Crop):
        return prepare if isinstance(prepare, StageCrop) else stage_crop(prepare, full, stage, "low_frequency", None)
    if type(prepare) is tuple:
        parts = tuple(with_own_crops(part, full, stage) for part in prepare)
        return parts if any(new is not old for new, old in zip(parts, prepare, strict=True)) else prepare
    if not is_dataclass(prepare) or isinstance(prepare, type):
        return prepare
    before = {f.name: getattr(prepare, f.name) for f in fields(prepare) if f.init}
    after = {name: with_own_crops(value, full, stage) for name, value in before.items()}
    changed = {name: value for name, value in after.items() if value is not before[name]}
    return replace(prepare, **changed) if changed else prepare


def lanczos(view: Tensor, size: int) -> Tensor:
    """Return uint8 (3, H, W) resized to (3, size, size) with Pillow's Lanczos filter."""
    return _tensor(_picture(view).resize((size, size), PIL.Image.Resampling.LANCZOS))


def rand_augment(view: Tensor, magnitude: int, at: Key) -> Tensor:
    """Return uint8 (3, H, W) after timm's RandAugment of `magnitude` (two operations, spread 0.5, increasing set).

    What is drawn depends on `at` alone (specification 3.3).
    """
    with _library_seeded(at.child("rand augment")):
        return _tensor(_operations(magnitude)(_picture(view)))


@functools.lru_cache
def _operations(magnitude: int) -> RandAugment:
    grey = tuple(round(255 * mean) for mean in NORMALIZATIONS["imagenet"][0])
    # At 10, the limit otherwise, timm posterises to 0 bits, which Pillow refuses.
    settings = {"img_mean": grey, "interpolation": PIL.Image.Resampling.BICUBIC, "magnitude_max": 9.99}
    return rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", settings)


@contextmanager
def _library_seeded(at: Key) -> Iterator[None]:
    """Run the body with Python's and numpy's global generators, which timm draws from, set from `at`; put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(at.integer())
    np.random.seed(at.integer() % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _picture(view: Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


def _tensor(picture: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
