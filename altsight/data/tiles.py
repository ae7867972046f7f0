"""A slide as tiles: where they lie, which of them show something, and their pixels batch by batch (MI-Zero's 1.3).

Never more than one batch of tiles is held as pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.slide import Slide, thumbnail

Coords = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tiling:
    """How tiles are read: `read` pixels of `level`, resized to `tile`; each covers `span` pixels of level 0."""

    tile: int
    level: int
    read: int
    span: int


def tiling(slide: Slide, tile: int, magnification: float) -> Tiling:
    """Return how to read tiles of `tile` pixels at `magnification` (specification 1.3).

    From the level that is smaller by (the slide's magnification / the one asked for), both rounded to a tenth; where
    there is none, from level 0 and resized. A slide that does not tell its magnification is read as it is.
    """
    shrink = slide.magnification / magnification if slide.magnification else 1.0
    for level, down in enumerate(slide.downsamples):
        if round(down, 1) == round(shrink, 1):
            return Tiling(tile, level, tile, round(tile * down))
    span = max(round(tile * shrink), 1)
    return Tiling(tile, 0, span, span)


def grid(size: tuple[int, int], span: int, stride: int) -> Coords:
    """Return the (left, top) of tiles of `span` pixels that cover a picture, (N, 2), row by row.

    Where the last tile of a row or column would reach beyond the picture it is moved back to the rim.

    Raises:
        UserError: the picture is smaller than a tile.
    """
    if min(size) < span:
        raise UserError(f"a slide of {size[0]} x {size[1]} pixels has no tile of {span}: lower --tiles.tile.")
    across, down = (np.unique([*range(0, length - span, stride), length - span]) for length in size)
    top, left = np.meshgrid(down, across, indexing="ij")
    return np.stack([left.ravel(), top.ravel()], axis=1).astype(np.int64)


def coloured(slide: Slide, coords: Coords, span: int, least: float) -> npt.NDArray[np.bool_]:
    """Return which tiles are foreground (N,): at least a share `least` of them is coloured, as stained tissue is.

    Coloured is what is more saturated than Otsu's threshold on a thumbnail of the slide, on which a tile is a pixel
    or more.
    """
    small = thumbnail(slide, max(1024, 2 * -(-max(slide.size) // span)))
    scale = small.shape[1] / slide.size[0]
    saturation = np.ptp(small, axis=2).astype(np.int64) * 255 // np.maximum(small.max(axis=2), 1)
    shown = (saturation > otsu(saturation)).astype(np.float64)
    # Sums over rectangles by a table of sums.
    table = np.pad(shown.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    left, top = np.floor(coords * scale).astype(int).T
    right = np.minimum(np.maximum(np.ceil((coords[:, 0] + span) * scale).astype(int), left + 1), small.shape[1])
    bottom = np.minimum(np.maximum(np.ceil((coords[:, 1] + span) * scale).astype(int), top + 1), small.shape[0])
    inside = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    found: npt.NDArray[np.bool_] = inside / ((right - left) * (bottom - top)) >= least
    return found


def otsu(values: npt.NDArray[Any]) -> int:
    """Return the threshold on values 0 ... 255 that parts them with the largest variance between (Otsu 1979).

    Values above it are the upper part.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, total = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(between).argmax())


def read_tiles(slide: Slide, coords: Coords, how: Tiling, batch: int) -> Iterator[Tensor]:
    """Yield the tiles at `coords` in order, uint8 (batch, 3, tile, tile) at a time.

    Raises:
        UserError: a part of the slide is damaged.
    """

    def read(place: npt.NDArray[np.int64]) -> Tensor:
        pixels = slide.read(int(place[0]), int(place[1]), how.level, how.read)
        return resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], how.tile)[0]

    # The libraries let other threads run while they decode.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(coords), batch):
            yield torch.stack(list(pool.map(read, coords[start : start + batch])))


def resize(images: Tensor, side: int) -> Tensor:
    """Return uint8 (B, 3, side, side), bicubic with antialiasing, from square images."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True)


def read_coords(path: Path) -> Coords:
    """Return the (left, top) of tiles in pixels of level 0, (N, 2), that another program found.

    From an array (.npy), a table with columns x and y (.csv), or `coords` in a .h5 file (CLAM's segmentation).

    Raises:
        UserError: the file is missing or holds no such coordinates.
    """
    if not path.is_file():
        raise UserError(f"the coordinates '{path}' do not exist.")
    try:
        coords = _load_coords(path)
        numbers = coords.astype(np.float64)
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"the coordinates '{path}' cannot be read ({error}).") from None
    if coords.ndim != 2 or coords.shape[1] != 2 or not len(coords):
        raise UserError(f"'{path}' must hold two numbers (left, top) a tile, and it holds an array {coords.shape}.")
    if not np.isfinite(numbers).all():
        raise UserError(f"'{path}' has a row without two numbers (left, top): mend it.")
    return numbers.astype(np.int64)


def _load_coords(path: Path) -> npt.NDArray[Any]:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".csv":
        if not path.stat().st_size:
            raise ValueError("it is empty")
        table = np.genfromtxt(path, delimiter=",", names=True)
        return np.stack([np.atleast_1d(table[name]) for name in ("x", "y")], axis=1)
    if path.suffix == ".h5":
        try:
            import h5py
        except ModuleNotFoundError:
            raise UserError(f"'{path}' needs h5py: `pip install 'altsight[slides]'`, or convert it to .npy.") from None
        with h5py.File(path) as file:
            return np.asarray(file["coords"])
    raise ValueError("known are .npy, .csv and .h5")
