"""A made-up source of pictures with one object each: as many as are asked for, every one a function of (seed, i)."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
import torch.nn.functional as F

from altsight.core.rng import Key, key
from altsight.core.types import Document, Image, Text
from altsight.data.cache import Cache
from altsight.data.order import Order

Array = npt.NDArray[np.float64]

SHAPES = ("circle", "cross", "square", "triangle")
COLOURS = {
    "blue": (50, 80, 220),
    "green": (50, 180, 70),
    "purple": (160, 60, 190),
    "red": (220, 50, 50),
    "yellow": (225, 205, 50),
}
SIZES = {"small": 0.11, "large": 0.2}
"""Name -> half of an object's side, as a share of the picture's."""
SIDES = {"left": 0.28, "right": 0.72}
"""Name -> where an object's middle lies on average, as a share of the picture's width."""
TEMPLATES = (
    "a {size} {colour} {shape} on the {side} side",
    "{colour} {shape} on the {side}, {size}",
    "there is a {size} {shape} in {colour} at the {side}",
    "on the {side} a {colour} {shape} of {size} size",
    "a picture of a {size} {colour} {shape} to the {side}",
    "the {side} side shows a {colour} {shape} that is {size}",
)
REMEMBERED = 2**14
"""Samples that are kept once they are made: a small set is seen many times over."""
CLASSES = tuple(sorted(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))


@dataclass(frozen=True)
class Shapes:
    """Pictures of one object on a noisy background, with a caption and a class (specification "Toy data").

    A class is a colour and a shape (20 of them); size and side are drawn besides. The caption names all four. Where a
    crop flips, captions and sides are wrong half of the time.

    size: number of samples. pixels: side of the pictures. Another seed gives other samples, as for another split.
    """

    size: int
    seed: int = 0
    pixels: int = 32

    def __len__(self) -> int:
        return self.size

    @property
    def is_remote(self) -> bool:
        """False: nothing is read."""
        return False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the 20 classes, sorted."""
        return CLASSES

    def document(self, i: int, at: Key) -> Document:
        """Return picture `i` and its caption; meta holds `label` (int). Nothing is left to be drawn by `at`."""
        parts = (Image(self.image(i)), Text(self._caption(i)))
        return Document(parts, self.name(i), {"label": CLASSES.index(self.fields(i)["label"])})

    def name(self, i: int) -> str:
        """Return the name of sample `i`."""
        return f"shapes {self.seed}#{i}"

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def parts(self) -> dict[str, int]:
        """Return the number of samples in the one part that there is."""
        return {f"shapes {self.seed}": self.size}

    def cached(self, cache: Cache | None) -> Shapes:
        """Return itself: there is nothing to be kept."""
        return self

    def thinned(self, most: int) -> Shapes:
        """Return the first `most` samples; they are as good as any others."""
        return replace(self, size=min(self.size, most))

    def image(self, i: int) -> bytes:
        """Return picture `i` as a PNG file."""
        return _png(self.seed, i, self.pixels)

    def fields(self, i: int) -> dict[str, Any]:
        """Return what sample `i` shows: `label` ("red circle"), `shape`, `colour`, `size` and `side`."""
        return dict(_fields(self.seed, i))

    def all_captions(self, i: int) -> list[str]:
        """Return the one caption of sample `i`."""
        return [self._caption(i)]

    texts = all_captions

    def _caption(self, i: int) -> str:
        template = _key(self.seed, i).child("caption").generator().integers(len(TEMPLATES))
        return TEMPLATES[template].format(**_fields(self.seed, i))


def _key(seed: int, i: int) -> Key:
    return key(seed, i, "shapes")


@functools.lru_cache(maxsize=REMEMBERED)
def _fields(seed: int, i: int) -> dict[str, str]:
    rng = _key(seed, i).generator()
    drawn = {
        name: str(rng.choice(list(values)))
        for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("side", SIDES))
    }
    return {"label": f"{drawn['colour']} {drawn['shape']}", **drawn}


@functools.lru_cache(maxsize=REMEMBERED)
def _png(seed: int, i: int, pixels: int) -> bytes:
    rng = _key(seed, i).child("picture").generator()
    fields = _fields(seed, i)
    paint = np.array(COLOURS[fields["colour"]]) + rng.normal(0, 12, 3)
    middle = rng.normal([0.5, SIDES[fields["side"]]], [0.08, 0.05])
    half = SIZES[fields["size"]] * rng.uniform(0.85, 1.15)
    cover = _cover(fields["shape"], pixels, middle, half)[..., None]
    picture = cover * paint + (1 - cover) * _background(pixels, rng)
    picture += rng.normal(0, 12, picture.shape)
    file = io.BytesIO()
    PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _background(pixels: int, rng: np.random.Generator) -> Array:
    """Return a smooth field of colours (pixels, pixels, 3): 4 x 4 random colours, enlarged."""
    coarse = torch.from_numpy(rng.normal(128, 25, (1, 3, 4, 4)))
    smooth: Array = F.interpolate(coarse, (pixels, pixels), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return smooth


def _cover(shape: str, pixels: int, middle: Array, half: float) -> Array:
    """Return how much of every pixel the object covers (pixels, pixels), in [0, 1]: soft over one pixel at its rim."""
    down, right = (_middles(pixels) - middle[:, None]) / half
    y, x = down[:, None], right[None, :]
    # Distance to the rim in units of `half`, positive inside.
    if shape == "circle":
        inside = 1 - np.hypot(x, y)
    elif shape == "square":
        inside = 0.9 - np.maximum(abs(x), abs(y))
    elif shape == "cross":
        inside = np.minimum(1 - np.maximum(abs(x), abs(y)), 0.33 - np.minimum(abs(x), abs(y)))
    else:
        inside = np.minimum(0.9 - y, (y + 1 - 1.9 * abs(x)) / 2.15)
    soft: Array = np.clip(inside * half * pixels + 0.5, 0, 1)
    return soft


@functools.lru_cache
def _middles(pixels: int) -> Array:
    """Return the middles of `pixels` pixels, from 0 to 1."""
    middles: Array = (np.arange(pixels) + 0.5) / pixels
    return middles
