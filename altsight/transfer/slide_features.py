"""The vectors of a slide's tiles: made once, tile batch by tile batch, and stored beside their coordinates."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.slide import Slide, open_slide
from altsight.data.tiles import Coords, Tiling, coloured, grid, read_coords, read_tiles, resize, tiling
from altsight.evals.base import View
from altsight.evals.store import place, read, write

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TileConfig:
    """Where tiles lie and how large they are; the defaults are MI-Zero's (specification 1.3)."""

    tile: int = 256
    """Side of a tile in pixels at `magnification`; it is resized to the encoder's input."""
    stride: int = 0
    """Pixels from one tile to the next, in the same unit; 0: `tile`, so that they do not overlap."""
    magnification: float = 20.0
    """At which slides are read that tell theirs; others are read as they are."""
    foreground: Literal["all", "coloured"] = "all"
    """all tiles, or those that are coloured, as stained tissue on glass is (Otsu's threshold on the saturation)."""
    least: float = 0.25
    """Share of a tile that must be coloured."""
    coords: Path | None = None
    """Coordinates that another program found (.npy, .csv, .h5); a folder holds one file for each slide's name."""


@dataclass(frozen=True)
class SlideFeatures:
    """The tiles of a slide: left and top (N, 2) in pixels of level 0, and the side of a tile there (span).

    vectors: unit vectors (N, E) in the joint space. features: (N, D), before any projection. Both fp32.
    """

    coords: Coords
    span: int
    vectors: Tensor
    features: Tensor


def _quiet(done: int, total: int) -> None:
    pass


def slide_features(
    view: View, path: Path, config: TileConfig, batch: int, folder: Path, progress: Progress = _quiet
) -> SlideFeatures:
    """Return the vectors of a slide; those in `folder` of the same weights, file and settings are taken from there.

    progress: is told how many tiles of how many are done.

    Raises:
        UserError: the slide cannot be read, has no tile of this size, or none that is foreground.
    """
    slide = open_slide(path)
    how = tiling(slide, config.tile, config.magnification)
    coords = _coords(slide, path, config, how)
    about = os.stat(path)
    facts = [str(about.st_size), str(about.st_mtime_ns), repr(how), hashlib.sha256(coords.tobytes()).hexdigest()]
    stored = place(folder, view, slide_name(path), facts)
    known = read(stored)
    if known is None:
        vectors, features = _encode(view, slide, coords, how, batch, progress)
        known = {"coords": torch.from_numpy(coords), "vectors": vectors, "features": features}
        write(stored, known)
    return SlideFeatures(coords, how.span, known["vectors"], known["features"])


def slide_name(path: Path) -> str:
    """Return the name of what is written for a slide: the file's, and 6 hex digits of where it lies."""
    return f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"


def _coords(slide: Slide, path: Path, config: TileConfig, how: Tiling) -> Coords:
    if config.coords is not None:
        given = _coords_file(config.coords, path)
        coords = read_coords(given)
        if (outside := (coords < 0) | (coords >= slide.size)).any():
            left, top = coords[outside.any(axis=1)][0]
            raise UserError(
                f"'{given}' has a tile at ({left}, {top}), outside of the slide '{path}' of {slide.size[0]} x "
                f"{slide.size[1]} pixels: coordinates are (left, top) in pixels of level 0."
            )
        return coords
    stride = round((config.stride or config.tile) * how.span / config.tile)
    coords = grid(slide.size, how.span, max(stride, 1))
    if config.foreground == "coloured":
        coords = coords[coloured(slide, coords, how.span, config.least)]
    if not len(coords):
        raise UserError(
            f"no tile of the slide '{path}' is coloured: use --tiles.foreground all, or lower --tiles.least."
        )
    return coords


def _coords_file(where: Path, slide: Path) -> Path:
    if not where.is_dir():
        return where
    found = [where / f"{slide.stem}{suffix}" for suffix in (".npy", ".csv", ".h5")]
    return next((path for path in found if path.is_file()), found[0])


def _encode(
    view: View, slide: Slide, coords: Coords, how: Tiling, batch: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    vectors, features = torch.empty(0), torch.empty(0)
    done = 0
    for tiles in read_tiles(slide, coords, how, batch):
        frozen, joint = view.vectors(resize(tiles, view.preprocess.size))
        assert joint is not None, "the view of a dual encoder has joint vectors"
        if not done:
            # One block each: thousands of small ones would keep the heap of the tiles from being used again.
            vectors, features = (torch.empty(len(coords), part.shape[1]) for part in (joint, frozen))
        vectors[done : done + len(tiles)], features[done : done + len(tiles)] = joint, frozen
        done += len(tiles)
        progress(done, len(coords))
    return vectors, features
