"""Stamps: the emoji of the embedded samples, cut out from their white background, to compose made-up pictures of."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import numpy.typing as npt
import PIL.Image
from scipy import ndimage

from altsight.core.errors import UserError
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate

Pixels = npt.NDArray[np.uint8]

WHITE = 225
"""Least value of all three channels of a pixel that may be background; less than 255 takes the pale rim off, too."""
COVERED = 128
"""Least alpha of a pixel that counts as covered by a stamp."""
VENDORS = ("fluent-emoji-flat", "noto", "openmoji")
"""Who drew the emoji: each of them drew every name once."""


@dataclass(frozen=True, eq=False)
class Stamp:
    """A drawing without its background: uint8 (H, W, 4) in RGBA, alpha 0 or 255, tightly cropped.

    name: what it shows ("red apple"). group: of 7 ("food-drink"). subgroup: of about 70 ("food-fruit").
    """

    pixels: Pixels
    name: str
    group: str
    subgroup: str
    vendor: str

    def sized(self, longer: int, flip: bool = False) -> Pixels:
        """Return the pixels with the longer side scaled to `longer`, mirrored if asked; the rim is soft."""
        height, width = self.pixels.shape[:2]
        scale = longer / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = PIL.Image.fromarray(self.pixels[:, ::-1] if flip else self.pixels)
        # Premultiplied, so that the white behind transparent pixels does not bleed into the rim.
        scaled = image.convert("RGBa").resize(size, PIL.Image.Resampling.BICUBIC).convert("RGBA")
        return np.asarray(scaled)


@functools.cache
def stamps(split: str = "train") -> tuple[Stamp, ...]:
    """Return all stamps of a split (train, val, test) in the order of the samples; no name is in two splits.

    Raises:
        UserError: the embedded sample data are not installed, or there is no such split.
    """
    pairs = read_pairs(locate(f"samples:emoji/{split}"), captions=())
    found = []
    for i in range(len(pairs)):
        fields = pairs.fields(i)
        with PIL.Image.open(io.BytesIO(pairs.image(i))) as image:
            pixels = cut_out(np.asarray(image.convert("RGB")))
        found.append(Stamp(pixels, *(fields[name] for name in ("name", "group", "subgroup", "vendor"))))
    return tuple(found)


def cut_out(image: Pixels) -> Pixels:
    """Return the uint8 (H, W, 3) drawing on white as RGBA: white that is connected to the border becomes transparent.

    White that a drawing encloses (an eye, a page) stays. Cropped to what is left.
    """
    white = np.pad(image.min(axis=2) >= WHITE, 1, constant_values=True)
    regions, _ = ndimage.label(white)
    kept = (regions != regions[0, 0])[1:-1, 1:-1]
    rgba = np.dstack([image, np.where(kept, 255, 0).astype(np.uint8)])
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    if not len(rows):
        return rgba
    return np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


@functools.cache
def stamps_of(
    names: tuple[str, ...], vendors: tuple[str, ...] = VENDORS, split: str = "train"
) -> tuple[tuple[Stamp, ...], ...]:
    """Return the drawings of each of `names` by `vendors`.

    Raises:
        UserError: the split has no emoji of a name.
    """
    known: dict[str, list[Stamp]] = {}
    for stamp in stamps(split):
        known.setdefault(stamp.name, [])
        if stamp.vendor in vendors:
            known[stamp.name].append(stamp)
    for name in names:
        if not known.get(name):
            hint = f" Did you mean '{near[0]}'?" if (near := get_close_matches(name, known, n=1)) else ""
            raise UserError(f"the {split} emoji by {', '.join(vendors)} have no '{name}'.{hint}")
    return tuple(tuple(known[name]) for name in names)
