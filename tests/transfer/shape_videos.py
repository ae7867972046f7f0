"""Videos of the toy CLIP's objects: 4 shapes in 5 colours that move across noise, as folders of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from altsight.core.rng import key
from altsight.data.clips import MOTIONS, moving
from altsight.data.shapes import CLASSES, COLOURS

Pixels = npt.NDArray[np.uint8]
LARGE = 8
"""How much larger shapes are drawn than they are shown."""


def shape(name: str, side: int, rng: np.random.Generator) -> Pixels:
    """Return the object of a class ("red circle") as uint8 (side, side, 4), with a soft rim."""
    colour, kind = name.split()
    paint = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 12, 3), 0, 255).astype(int)
    cover = PIL.Image.new("L", (side * LARGE, side * LARGE))
    draw, end = PIL.ImageDraw.Draw(cover), side * LARGE - 1
    if kind == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif kind == "square":
        draw.rectangle((0.05 * end, 0.05 * end, 0.95 * end, 0.95 * end), fill=255)
    elif kind == "triangle":
        draw.polygon([(0.5 * end, 0), (0.95 * end, 0.95 * end), (0.05 * end, 0.95 * end)], fill=255)
    else:
        draw.rectangle((0, 0.335 * end, end, 0.665 * end), fill=255)
        draw.rectangle((0.335 * end, 0, 0.665 * end, end), fill=255)
    alpha = np.asarray(cover.resize((side, side), PIL.Image.Resampling.BOX))
    return np.dstack([np.broadcast_to(paint.astype(np.uint8), (side, side, 3)), alpha])


def noise(rng: np.random.Generator, side: int = 32) -> Pixels:
    """Return a background like that of `Shapes`: smooth spots."""
    coarse = rng.normal(128, 25, (4, 4, 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC))


def shape_video(name: str, motion: str, frames: int, seed: int) -> Pixels:
    """Return uint8 (frames, 32, 32, 3)."""
    at = key(seed, 0, f"shape video {name} {motion}")
    rng = at.generator()
    found = moving(shape(name, int(rng.integers(8, 13)), rng), motion, noise(rng), frames, at)
    return (found + rng.normal(0, 12, found.shape)).clip(0, 255).astype(np.uint8)


def write_shape_videos(folder: Path, count: int, seed: int, frames: int = 4, classes: Sequence[str] = CLASSES) -> None:
    """Write `count` videos for each class, as class folders of folders of frames; where they move to is drawn."""
    for name in classes:
        for i in range(count):
            number = seed * 10_000 + i
            motion = list(MOTIONS)[int(key(number, 0, f"motion of {name}").generator().integers(4))]
            write_frames(folder / name / f"{i:03d}", shape_video(name, motion, frames, number))


def write_motions(
    folder: Path, count: int, seed: int, frames: int = 8, motions: Sequence[str] = ("left", "right")
) -> None:
    """Write `count` videos for each motion; what moves is drawn."""
    for motion in motions:
        for i in range(count):
            number = seed * 10_000 + i
            name = CLASSES[int(key(number, 0, f"object moving {motion}").generator().integers(20))]
            write_frames(folder / motion / f"{i:03d}", shape_video(name, motion, frames, number))


def write_frames(folder: Path, frames: Pixels) -> None:
    """Write a video as pictures in a folder."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(frames):
        PIL.Image.fromarray(pixels).save(folder / f"{i:03d}.png", compress_level=1)
