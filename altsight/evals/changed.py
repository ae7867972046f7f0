"""Pairs whose images are changed between decoding and preprocessing: borders cut off, corruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altsight.data.decode import BrokenImage, decode
from altsight.data.sources import Pairs

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) in RGB."""
Change = Callable[[Pixels, int], Pixels]
"""(pixels, index of the sample) -> pixels."""


def _unchanged(pixels: Pixels, i: int) -> Pixels:
    return pixels


@dataclass(frozen=True)
class Changed(Pairs):
    """Pairs as they are, but for their images: each is decoded, changed, and handed on without loss."""

    change: Change = _unchanged

    @staticmethod
    def of(pairs: Pairs, change: Change) -> Changed:
        """Return `pairs` with their images changed, after any change that they have already."""
        before = pairs.change if isinstance(pairs, Changed) else _unchanged

        def both(pixels: Pixels, i: int) -> Pixels:
            return change(before(pixels, i), i)

        return Changed(pairs.index, pairs.captions, pairs.label, pairs.classes, pairs.images, both)

    def image(self, i: int) -> bytes:
        """Return the changed image of pair `i` as the bytes of a PPM file; BrokenImage where it cannot be decoded."""
        pixels = decode(super().image(i)).permute(1, 2, 0).numpy()
        changed = self.change(pixels, i)
        return b"P6 %d %d 255\n" % (changed.shape[1], changed.shape[0]) + np.ascontiguousarray(changed).tobytes()


def trimmed(border: int) -> Change:
    """Return the change that cuts `border` pixels off at every side (ObjectNet's red border has 2)."""

    def change(pixels: Pixels, i: int) -> Pixels:
        if min(pixels.shape[:2]) <= 2 * border:
            raise BrokenImage(f"nothing is left of {pixels.shape[1]} x {pixels.shape[0]} pixels without the border")
        return pixels[border:-border, border:-border]

    return change
