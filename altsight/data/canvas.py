"""Made-up gigapixel images: noise with a few small objects of one class, written as tiled TIFF piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.stamps import stamps_of

Pixels = npt.NDArray[np.uint8]

PIECE = 256
"""Side of a piece of the file, in pixels."""
GRAIN = 8
"""Side of the smooth spots of the background, in pixels."""
BACKGROUNDS = 32
"""Different pieces of background; the pieces of a canvas are drawn from them."""


def write_canvas(path: Path, side: int, objects: Sequence[Pixels], cell: int, seed: int) -> npt.NDArray[np.int64]:
    """Write a canvas of side x side pixels and return where its objects lie: (left, top) of each, (n, 2).

    The canvas is a grid of cells; each object lies somewhere in a cell of its own, drawn by `seed`. Pieces of the file
    are made one after the other, so a canvas of 20,000 pixels takes no more memory than a small one.

    Args:
        objects: uint8 (h, w, 3), or (h, w, 4) whose last channel is how much they cover; no larger than a cell.
        cell: side of a cell in pixels.

    Raises:
        UserError: the objects do not fit, or tifffile is missing.
    """
    try:
        import tifffile
    except ModuleNotFoundError:
        raise UserError("made canvases need tifffile: `pip install 'altsight[slides]'`.") from None
    places = _places(side, objects, cell, seed)
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        part,
        _pieces(side, objects, places, seed),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(PIECE, PIECE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 90},
        bigtiff=side > 30_000,
    )
    part.replace(path)
    return places


def write_canvases(
    folder: Path, objects: Mapping[str, Sequence[Pixels]], count: int, side: int, targets: int, cell: int, seed: int = 0
) -> None:
    """Write `count` canvases with `targets` objects for each class into class folders, and classes.txt beside them.

    objects: class -> drawings of it, from which those of a canvas are drawn.
    """
    for number, (name, drawings) in enumerate(objects.items()):
        for i in range(count):
            at = key(seed, number * count + i, "canvas")
            chosen = at.child("objects").generator().integers(len(drawings), size=targets)
            write_canvas(folder / name / f"{i:03d}.tif", side, [drawings[j] for j in chosen], cell, at.integer())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in objects), encoding="utf-8")


def emoji(names: Sequence[str], pixels: int, split: str = "train") -> dict[str, list[Pixels]]:
    """Return name -> the emoji of that name, `pixels` long, uint8 (h, w, 4); drawings for `write_canvases`."""
    found = stamps_of(tuple(names), split=split)
    return {name: [stamp.sized(pixels) for stamp in drawn] for name, drawn in zip(names, found, strict=True)}


def _places(side: int, objects: Sequence[Pixels], cell: int, seed: int) -> npt.NDArray[np.int64]:
    cells = (side // cell) ** 2
    if len(objects) > cells or any(max(drawing.shape[:2]) > cell for drawing in objects):
        raise UserError(f"{len(objects)} objects do not fit into {cells} cells of {cell} pixels: use a larger canvas.")
    rng = key(seed, 0, "places").generator()
    down, across = np.divmod(rng.permutation(cells)[: len(objects)], side // cell)
    room = np.array([(cell - d.shape[1], cell - d.shape[0]) for d in objects]).reshape(-1, 2)
    found: npt.NDArray[np.int64] = np.stack([across, down], axis=1) * cell + rng.integers(0, room + 1)
    return found


def _pieces(side: int, objects: Sequence[Pixels], places: npt.NDArray[np.int64], seed: int) -> Iterator[Pixels]:
    """Yield the pieces of the file in order, row by row, uint8 (PIECE, PIECE, 3)."""
    rng = key(seed, 0, "background").generator()
    backgrounds = [_background(rng) for _ in range(BACKGROUNDS)]
    sizes = np.array([(d.shape[1], d.shape[0]) for d in objects]).reshape(-1, 2)
    for top in range(0, side, PIECE):
        for left in range(0, side, PIECE):
            piece = backgrounds[rng.integers(BACKGROUNDS)].copy()
            corner = np.array([left, top])
            inside = ((places < corner + PIECE) & (places + sizes > corner)).all(axis=1)
            for i in inside.nonzero()[0]:
                _paste(objects[i], piece, *(places[i] - corner))
            yield piece


def _background(rng: np.random.Generator) -> Pixels:
    coarse = rng.normal(128, 25, (PIECE // GRAIN, PIECE // GRAIN, 3)).clip(0, 255).astype(np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((PIECE, PIECE), PIL.Image.Resampling.BICUBIC)
    noisy: Any = np.asarray(smooth) + rng.normal(0, 6, (PIECE, PIECE, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def _paste(drawing: Pixels, piece: Pixels, left: int, top: int) -> None:
    """Put a drawing onto a piece, at a place that may be partly outside."""
    rows = slice(max(top, 0), min(top + drawing.shape[0], PIECE))
    columns = slice(max(left, 0), min(left + drawing.shape[1], PIECE))
    part = drawing[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    cover = part[..., 3:] / 255 if part.shape[2] == 4 else 1.0
    piece[rows, columns] = np.round(part[..., :3] * cover + piece[rows, columns] * (1 - cover))
