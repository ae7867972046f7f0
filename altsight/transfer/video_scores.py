"""Videos that were not trained on: their vectors over several views, and how well they are told apart.

Specification 4.3 (views) and 4.4 (protocols).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core import dist
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.record import BrokenSample
from altsight.data.video import Videos
from altsight.evals.base import Result, View
from altsight.evals.bootstrap import LEVEL, RESAMPLES
from altsight.train.log import progress_bar
from altsight.transfer.classify import accuracies, precision
from altsight.transfer.text4vis import Text4Vis

HALVES = 10
"""Splits of the half-class protocol; split i is drawn by numpy's generator under the seed i, as in the source."""


@dataclass(frozen=True)
class Seen:
    """Videos of a set: un-normalised vectors (n, E), and class ids (n,), -1 where there is none."""

    vectors: Tensor
    labels: Tensor


def crops(frames: Tensor, size: int, count: Literal[1, 3]) -> Tensor:
    """Return `count` squares of each frame, resized: uint8 (count, T, 3, size, size) from (T, 3, H, W).

    The shorter side is kept whole; one square is in the middle of the longer, three are at its ends and in the middle.
    """
    height, width = frames.shape[2:]
    side, room = min(height, width), max(height, width) - min(height, width)
    offsets = [room // 2] if count == 1 else [0, room // 2, room]
    found = []
    for offset in offsets:
        part = frames[:, :, :, offset : offset + side] if width > height else frames[:, :, offset : offset + side]
        same = side == size
        found.append(part if same else F.interpolate(part, (size, size), mode="bicubic", antialias=True))
    return torch.stack(found)


@torch.inference_mode()
def see(method: Text4Vis, videos: Videos, batch: int, count: Literal[1, 3] = 1, skip_broken: bool = False) -> Seen:
    """Return the vectors of videos, each the mean over its clips and crops of un-normalised vectors.

    batch: frames that are encoded at a time, about. skip_broken: leave out what does not decode.

    Raises:
        UserError: a video does not decode, and is not to be left out; or none does.
    """
    place, device = dist.world(), next(method.parameters()).device
    method.eval()
    mine: list[tuple[int, npt.NDArray[np.float32], int]] = []
    numbers = range(place.rank, len(videos), place.size)
    at_once = max(batch // (videos.frames * videos.clips * count), 1)
    # PyAV lets other threads run while it decodes.
    with progress_bar() as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        task = bar.add_task("videos", total=len(numbers), note="")
        for start in range(0, len(numbers), at_once):
            read = pool.map(
                lambda i: _views(videos, i, method.encoder.config.img_size, count), numbers[start : start + at_once]
            )
            kept = [found for found in read if _usable(found, skip_broken)]
            if kept:
                clips = torch.cat([clip for _, clip, _ in kept]).to(device)
                vectors = method.vectors(clips).float().unflatten(0, (len(kept), -1)).mean(dim=1)
                mine += [(i, v.cpu().numpy(), label) for (i, _, label), v in zip(kept, vectors, strict=True)]
            bar.advance(task, len(numbers[start : start + at_once]))
    rows = sorted((row for part in dist.gather_objects(mine) for row in part), key=lambda row: row[0])
    if not rows:
        raise UserError(f"none of the {len(videos)} videos decodes; the first one is '{videos.name(0)}'.")
    return Seen(torch.from_numpy(np.stack([row[1] for row in rows])), torch.tensor([row[2] for row in rows]))


_Read = tuple[int, Tensor, int]


def _views(videos: Videos, i: int, size: int, count: Literal[1, 3]) -> _Read | UserError:
    """Return the number of a video, its views (clips * crops, T, 3, size, size), and its class; or what is wrong."""
    try:
        document = videos.document(i, key(0, i, "test"))
    except BrokenSample as error:
        return UserError(f"the video '{videos.name(i)}' cannot be used, {error}: mend it, or take it out.")
    squares = crops(document.meta["frames"], size, count)
    return i, squares.unflatten(1, (videos.clips, videos.frames)).flatten(0, 1), document.meta["label"]


def _usable(found: _Read | UserError, skip_broken: bool) -> TypeGuard[_Read]:
    if isinstance(found, UserError) and not skip_broken:
        raise found
    return not isinstance(found, UserError)


def score(view: View, logits: Tensor, labels: Tensor, after: str, facts: dict[str, Any]) -> Iterator[Result]:
    """Yield the accuracies of logits (n, C) and labels (n,), and the mAP of their softmax.

    after: is put behind the names of the metrics. facts: the remaining fields of `Result`.
    """
    chances = logits.softmax(dim=1)
    found = [
        *accuracies(view, logits, labels, facts),
        precision(view, chances, F.one_hot(labels, logits.shape[1]), facts),
    ]
    yield from (replace(result, metric=result.metric + after) for result in found)


def half_classes(view: View, logits: Tensor, labels: Tensor, after: str, seed: int, facts: dict[str, Any]) -> Result:
    """Return the accuracy among half of the classes, over `HALVES` splits.

    A split is the first half of a permutation of the classes; its videos are told apart among these classes alone.
    The interval is that of the mean over splits, over resampled videos; the deviation of the splits is in the note.
    """
    classes = logits.shape[1]
    members, hits = np.zeros((2, HALVES, len(labels)))
    for split in range(HALVES):
        chosen = np.random.RandomState(split).permutation(classes)[: classes // 2]
        hidden = torch.full((classes,), -torch.inf)
        hidden[torch.from_numpy(chosen)] = 0
        members[split] = np.isin(labels.numpy(), chosen)
        hits[split] = members[split] * ((logits + hidden).argmax(dim=1) == labels).numpy()
    shown = members.any(axis=1)
    members, hits = members[shown], hits[shown]
    values = hits.sum(axis=1) / members.sum(axis=1)
    drawn = key(seed, 0, "bootstrap").generator().multinomial(len(labels), [1 / len(labels)] * len(labels), RESAMPLES)
    means = (drawn @ hits.T / np.maximum(drawn @ members.T, 1)).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    note = f"mean of {len(values)} halves, +- {values.std():.4f}; {facts['note']}"
    return Result(
        metric=f"top1 of half the classes{after}",
        value=float(values.mean()),
        low=float(low),
        high=float(high),
        chance=1 / (classes // 2),
        n=len(labels),
        preprocess=view.preprocess.hash(),
        **{**facts, "note": note, "extra": {**facts["extra"], "std": float(values.std()), "values": values.tolist()}},
    )
