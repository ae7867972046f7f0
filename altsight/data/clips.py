"""Made-up videos of one object that moves: what moves, and where to, are the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.data.stamps import stamps_of

Pixels = npt.NDArray[np.uint8]

MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name -> the direction (x, y), downwards from the top."""


def write_moving(
    folder: Path,
    names: Sequence[str],
    count: int,
    motions: Sequence[str] = tuple(MOTIONS),
    by: Literal["object", "motion", "both"] = "both",
    pixels: int = 64,
    frames: int = 16,
    seed: int = 0,
    suffix: str = ".mp4",
) -> None:
    """Write `count` videos of a moving emoji for each class into class folders, and classes.txt beside them.

    Classes are what moves ("red apple"), where to ("left"), or both ("red apple moving left"); the rest is drawn.

    Args:
        names: of emoji. motions: of `MOTIONS`. pixels: side of the videos. suffix: .mp4 (MPEG-4) or .webm (VP9).

    Raises:
        UserError: an emoji is not known, or PyAV is missing.
    """
    drawings = dict(zip(names, stamps_of(tuple(names)), strict=True))
    titles = _titles(names, motions, by)
    for number, (title, (mine, ways)) in enumerate(titles.items()):
        (folder / title).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            at = key(seed, number * count + i, "video")
            rng = at.generator()
            drawn = drawings[mine[int(rng.integers(len(mine)))]]
            stamp = drawn[int(rng.integers(len(drawn)))].sized(round(pixels * rng.uniform(0.35, 0.5)))
            background = np.full((pixels, pixels, 3), rng.integers(200, 256, 3), np.uint8)
            video = moving(stamp, ways[int(rng.integers(len(ways)))], background, frames, at)
            write_video(folder / title / f"{i:03d}{suffix}", video)
    (folder / "classes.txt").write_text("".join(f"{title}\n" for title in titles), encoding="utf-8")


def _titles(names: Sequence[str], motions: Sequence[str], by: str) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Return class -> what may move in its videos, and where to."""
    if by == "object":
        return {name: ((name,), motions) for name in names}
    if by == "motion":
        return {motion: (names, (motion,)) for motion in motions}
    return {f"{name} moving {motion}": ((name,), (motion,)) for name in names for motion in motions}


def moving(stamp: Pixels, motion: str, background: Pixels, frames: int, at: Key) -> Pixels:
    """Return uint8 (frames, H, W, 3): a drawing (h, w, 4) that moves across the background (H, W, 3), rim to rim.

    A video to the left has the frames of one to the right in the opposite order, so that only their order tells them
    apart, where all are read. Where the drawing passes is drawn by `at`.
    """
    rng = at.child("path").generator()
    height, width = stamp.shape[:2]
    room = np.array([background.shape[1] - width, background.shape[0] - height], dtype=np.float64)
    share = np.linspace(0, 1, frames)[:, None]
    step = np.array(MOTIONS[motion])
    places = room * np.where(step == 0, rng.uniform(0, 1, 2), np.where(step > 0, share, 1 - share))
    found = np.repeat(background[None], frames, axis=0)
    cover = stamp[..., 3:] / 255
    for frame, (left, top) in zip(found, np.round(places).astype(int), strict=True):
        part = frame[top : top + height, left : left + width]
        part[:] = np.round(stamp[..., :3] * cover + part * (1 - cover))
    return found


def write_video(path: Path, frames: Pixels, rate: int = 8, key_every: int = 8) -> None:
    """Write uint8 (T, H, W, 3), with even sides, as .mp4 (MPEG-4) or .webm (VP9), a key frame every `key_every`.

    Raises:
        UserError: PyAV is missing.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise UserError("made videos need PyAV: `pip install 'altsight[video]'`.") from None
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    codec = "libvpx-vp9" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", key_every
        stream.bit_rate = 2_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)
