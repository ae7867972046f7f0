"""Videos -> the few frames that are wanted: decoded by PyAV from the key frame before each, or read from a folder.

A folder of pictures is a video whose frames are extracted already, in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Document
from altsight.data.cache import Cache
from altsight.data.decode import BrokenImage, decode
from altsight.data.listing import Item
from altsight.data.order import Order
from altsight.data.record import IMAGE_SUFFIXES, BrokenSample

Choose = Callable[[int], Sequence[int]]
"""Number of frames of a video -> the places of those that are wanted; one may be wanted more than once."""

SUFFIXES = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".gif"})


def is_video(path: Path) -> bool:
    """Return whether a path is a video by its suffix, or a folder with frames."""
    if path.is_dir():
        return any(_is_frame(inside) for inside in path.iterdir())
    return path.suffix.lower() in SUFFIXES


def segment_frames(count: int, frames: int, at: Key | None, part: float = 0.0) -> list[int]:
    """Return `frames` places, one in each of as many equal segments of a video of `count` frames (TSN).

    at: draws the place within each segment, in training. Without it, it is the segment's first frame, or the one a
    share `part` further on. A video with fewer frames shows some of them more than once.
    """
    edges = np.arange(frames + 1) * count / frames
    shares = np.full(frames, part) if at is None else at.child("frames").generator().random(frames)
    places = edges[:-1] + shares * (count / frames)
    return [int(place) for place in np.minimum(places, count - 1)]


def dense_frames(count: int, frames: int, at: Key | None, part: float = 0.0, span: int = 64) -> list[int]:
    """Return `frames` evenly spaced places in a window of `span` frames, or in all where there are fewer.

    at: draws where the window begins, in training. Without it, a share `part` of the way it can be moved.
    """
    span = min(span, count)
    share = part if at is None else float(at.child("window").generator().random())
    start = int(share * (count - span + 1)) if at is not None else round(share * (count - span))
    return [start + place for place in segment_frames(span, frames, None)]


def read_frames(path: Path, choose: Choose, shorter: int = 256) -> Tensor:
    """Return the frames that `choose` wants, uint8 (T, 3, H, W), their shorter side no more than `shorter` pixels.

    Raises:
        BrokenSample: the video has no frames, or does not decode.
    """
    frames = _read_folder(path, choose) if path.is_dir() else _read_file(path, choose, shorter)
    height, width = frames.shape[2:]
    if min(height, width) <= shorter:
        return frames
    scale = shorter / min(height, width)
    size = (max(round(height * scale), shorter), max(round(width * scale), shorter))
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


def _read_folder(path: Path, choose: Choose) -> Tensor:
    files = sorted(inside for inside in path.iterdir() if _is_frame(inside))
    wanted = choose(len(files)) if files else ()
    try:
        read = {place: decode(files[place].read_bytes()) for place in set(wanted)}
    except (OSError, BrokenImage) as error:
        raise BrokenSample(str(error)) from None
    if not read or len({frame.shape for frame in read.values()}) > 1:
        raise BrokenSample("its frames are of several sizes" if read else "it has no frames")
    return torch.stack([read[place] for place in wanted])


def _read_file(path: Path, choose: Choose, shorter: int) -> Tensor:
    try:
        import av
    except ModuleNotFoundError:
        raise UserError("videos need PyAV: `pip install 'altsight[video]'`.") from None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            return _decode(container, stream, choose, shorter)
    except (OSError, av.error.FFmpegError, IndexError, ValueError, StopIteration) as error:
        raise BrokenSample(f"it does not decode ({error or type(error).__name__})") from None


def _decode(container: Any, stream: Any, choose: Choose, shorter: int) -> Tensor:
    """Decode the wanted frames, each from the key frame before it, or on from the one before.

    Which frames there are is known from the packets, which are read but not decoded: what containers say of the number
    of frames is often wrong, and frames need not be evenly spaced in time.
    """
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    times = sorted(packet.pts for packet in packets)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    if not times or not keys:
        raise BrokenSample("it has no frames")
    wanted = choose(len(times))
    found: dict[int, Tensor] = {}
    reached: int | None = None
    decoder: Iterator[Any] = iter(())
    for place in sorted(set(wanted)):
        start = keys[max(bisect_right(keys, times[place]) - 1, 0)]
        if reached is None or start > reached:
            container.seek(start, stream=stream)
            decoder = container.decode(stream)
        frame = next(frame for frame in decoder if frame.pts is not None and frame.pts >= times[place])
        reached = frame.pts
        found[place] = _pixels(frame, shorter)
    return torch.stack([found[place] for place in wanted])


def _pixels(frame: Any, shorter: int) -> Tensor:
    """Return uint8 (3, H, W), upright; a large frame is made smaller on the way, at twice the size that is wanted."""
    scale = min(1.0, 2 * shorter / min(frame.width, frame.height))
    size = {"width": round(frame.width * scale), "height": round(frame.height * scale)} if scale < 1 else {}
    pixels: npt.NDArray[np.uint8] = frame.reformat(format="rgb24", **size).to_ndarray()
    pixels = np.rot90(pixels, getattr(frame, "rotation", 0) // 90)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _is_frame(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Videos:
    """A source of labelled videos; see `altsight.data.sources.Source`. Documents hold `frames` and `label` in meta.

    Training draws one clip by key; otherwise `clips` of them are read, spread over the video.

    frames: of a clip. dense: they lie in a window of 64 frames, instead of all over the video. shorter: side in pixels
    to which frames are made smaller.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    frames: int
    training: bool = True
    clips: int = 1
    dense: bool = False
    shorter: int = 256

    def __len__(self) -> int:
        return len(self.items)

    @property
    def is_remote(self) -> bool:
        """False: videos lie on disk."""
        return False

    def document(self, i: int, at: Key) -> Document:
        """Return video `i`: meta holds `frames`, uint8 (clips * T, 3, H, W), and `label` (int) where it has one.

        Raises:
            BrokenSample: it does not decode.
        """
        item = self.items[i]
        frames = read_frames(item.path, lambda count: self._places(count, at), self.shorter)
        meta: dict[str, Any] = {"frames": frames}
        if item.label:
            meta["label"] = self.classes.index(item.label)
        return Document((), self.name(i), meta)

    def _places(self, count: int, at: Key) -> list[int]:
        pick = dense_frames if self.dense else segment_frames
        if self.training:
            return pick(count, self.frames, at)
        return [p for clip in range(self.clips) for p in pick(count, self.frames, None, clip / self.clips)]

    def name(self, i: int) -> str:
        """Return where video `i` lies."""
        return str(self.items[i].path)

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Labels are no text to learn from."""
        return []

    def parts(self) -> dict[str, int]:
        """Return the number of videos in every folder."""
        counts: dict[str, int] = {}
        for item in self.items:
            counts[str(item.path.parent)] = counts.get(str(item.path.parent), 0) + 1
        return counts

    def cached(self, cache: Cache | None) -> Videos:
        """Return itself: nothing is remote."""
        return self

    def few(self, shots: int, seed: int) -> Videos:
        """Return `shots` videos of each class, drawn by `seed`, repeated to as many videos as there were before.

        The source draws them without a seed, on every rank anew (specification 4.6).

        Raises:
            UserError: a class has fewer.
        """
        for name in self.classes:
            count = sum(item.label == name for item in self.items)
            if count < shots:
                raise UserError(f"the class '{name}' has {count} videos, fewer than --shots {shots}.")
        chosen = self.at_most(shots, seed).items
        size = max(len(self.items), len(chosen))
        return replace(self, items=(chosen * -(-size // len(chosen)))[:size])

    def at_most(self, count: int, seed: int) -> Videos:
        """Return `count` different videos of each class, drawn by `seed`, or all where there are fewer."""
        chosen: list[Item] = []
        for number, name in enumerate(self.classes):
            mine = sorted({item for item in self.items if item.label == name}, key=lambda item: str(item.path))
            order = key(seed, number, "few-shot").generator().permutation(len(mine))
            chosen += [mine[i] for i in order[:count]]
        return replace(self, items=tuple(chosen))

    def digest(self) -> str:
        """Return 12 hex digits over the names, sizes and labels of the videos."""
        facts = [(item.path.name, item.path.stat().st_size, item.label) for item in self.items]
        return hashlib.sha256(json.dumps([facts, self.classes]).encode()).hexdigest()[:12]
