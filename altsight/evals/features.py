"""Frozen features, labels and captions of a split: extracted once per view, or once on disk, sharded over ranks.

Blocks of `view.batch_size` consecutive samples are dealt out to the ranks, so that every batch holds the same samples
whatever the number of ranks, and the features are equal to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from altsight.core.dist import gather_objects, world
from altsight.core.errors import UserError
from altsight.data.decode import BrokenImage
from altsight.data.sources import Pairs
from altsight.evals import store
from altsight.evals.base import Preprocess, Split, Task, View

T = TypeVar("T")
MAX_CACHED_BYTES = 2**28
"""Decoded images of a split are kept for the next view if they take less than this."""


@dataclass(frozen=True)
class Extracted:
    """Features of the samples of a source whose image can be decoded.

    vectors: fp32 (n, D), before any projection. joint: unit vectors (n, E) in the joint space of a dual encoder.
    kept: index of each row in the source. digests: SHA-256 of its image.
    """

    source: Pairs
    vectors: Tensor
    joint: Tensor | None
    kept: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def broken(self) -> int:
        """How many images could not be decoded."""
        return len(self.source) - len(self.kept)


@dataclass(frozen=True)
class Labelled:
    """Features (n, D) and class ids (n,) of the samples of a split that have both.

    rows: their places in `extract(...)`. data: hash of their images and labels.
    """

    vectors: Tensor
    labels: Tensor
    rows: tuple[int, ...]
    data: str
    note: str


@dataclass(frozen=True)
class _Block:
    """The images of some consecutive samples that can be decoded, uint8 (n, 3, size, size)."""

    pixels: Tensor
    kept: tuple[int, ...]
    digests: tuple[str, ...]


def extract(view: View, split: Split) -> Extracted:
    """Return the features of `split`; a second call returns the same object from `view.cache`.

    Raises:
        UserError: none of the images can be decoded, or the encoder's output is not finite.
    """
    # The entry holds its source, so the id cannot pass to another object while the entry lives.
    name = f"features/{id(split.source)}"
    if name not in view.cache:
        view.cache[name] = _extract(view, split) if view.store is None else _stored(view, split, view.store)
    return cast(Extracted, view.cache[name])


def joint_vectors(view: View, split: Split) -> Tensor:
    """Return the image vectors of a dual encoder in the joint space, unit length (n, E), in the order of `extract`."""
    name = f"joint/{id(split.source)}"
    if name not in view.cache:
        joint = extract(view, split).joint
        assert joint is not None, "only the view of a dual encoder has joint vectors"
        view.cache[name] = finite(joint, view)
    return cast(Tensor, view.cache[name])


def labelled(view: View, task: Task, split: Split) -> Labelled:
    """Return the features and class ids of the samples of `split` that have a label and a readable image.

    Raises:
        UserError: there are none.
    """
    extracted, names, classes = extract(view, split), labels_of(split, task.label), classes_of(task)
    ids = {name: i for i, name in enumerate(classes)}
    rows = [row for row, sample in enumerate(extracted.kept) if names[sample] in ids]
    if not rows:
        raise UserError(
            f"the split '{split.name}' of the task '{task.name}' has no image with a '{task.label}': mend it."
        )
    labels = [names[extracted.kept[row]] for row in rows]
    unlabelled = sum(not names[sample] for sample in extracted.kept)
    outside = len(extracted.kept) - len(rows) - unlabelled
    return Labelled(
        extracted.vectors[rows],
        torch.tensor([ids[name] for name in labels], dtype=torch.int64),
        tuple(rows),
        content_hash((extracted.digests[row], name) for row, name in zip(rows, labels, strict=True)),
        left_out(
            split, {"a broken image": extracted.broken, "no label": unlabelled, "a class outside of the set": outside}
        ),
    )


def classes_of(task: Task) -> tuple[str, ...]:
    """Return the labels of the task's classes, or the sorted labels of all three splits where it names none.

    Raises:
        UserError: no sample has the task's label.
    """
    if task.classes:
        return tuple(task.classes)
    splits = (task.train, task.val, task.test)
    if task.multi_label:
        names = {name for split in splits for several in label_lists_of(split, task.label) for name in several}
    else:
        names = {name for split in splits for name in labels_of(split, task.label)} - {""}
    if not names:
        raise UserError(f"no sample of the task '{task.name}' has a JSON field '{task.label}': name another label.")
    return tuple(sorted(names))


def labels_of(split: Split, field: str) -> list[str]:
    """Return the label of every sample of `split` ("" where it has none)."""

    def read(i: int) -> str:
        value = split.source.fields(i).get(field)
        if isinstance(value, list):
            raise UserError(f"the field '{field}' of {split.source.name(i)} is a list: set multi_label = true.")
        return "" if value is None else str(value)

    return _each(split, f"labels/{field}", read)


def label_lists_of(split: Split, field: str) -> list[tuple[str, ...]]:
    """Return the labels of every sample of `split`, whose field holds a list of them; () where it has none."""

    def read(i: int) -> tuple[str, ...]:
        value = split.source.fields(i).get(field)
        return tuple(map(str, value)) if isinstance(value, list) else () if value is None else (str(value),)

    return _each(split, f"label lists/{field}", read)


def captions_of(split: Split) -> list[list[str]]:
    """Return all captions of every sample of `split`."""
    return _each(split, "captions", split.source.all_captions)


def rate_of_commonest(train: Tensor, test: Tensor) -> float:
    """Return the accuracy on `test` of always answering the commonest class of `train` (class ids)."""
    return float((test == train.bincount().argmax()).double().mean())


def content_hash(rows: Iterable[Any]) -> str:
    """Return 12 hex digits over JSON-able rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:12]


def left_out(split: Split, reasons: dict[str, int]) -> str:
    """Return "test: 2 samples with a broken image left out", or "" if nothing was."""
    parts = [f"{count} with {reason}" for reason, count in reasons.items() if count]
    return f"{split.name}: left out {' and '.join(parts)}" if parts else ""


def join_notes(*notes: str) -> str:
    """Return the distinct notes that say something, joined by semicolons."""
    return "; ".join(dict.fromkeys(note for note in notes if note))


def finite(vectors: Tensor, view: View) -> Tensor:
    """Return `vectors`.

    Raises:
        UserError: one of them is not finite. (A comparison with NaN is false, so it would rank first.)
    """
    if not bool(torch.isfinite(vectors).all()):
        raise UserError(
            f"'{view.name}' yields features that are not finite: its training diverged, or its weights are damaged."
        )
    return vectors


def _stored(view: View, split: Split, folder: Path) -> Extracted:
    """Return the features of `split` from `folder`, or extract them and put them there."""
    digests = _each(split, "digests", lambda i: _digest(split.source, i))
    path = store.place(folder, view, split.name, digests)
    found = store.read(path)
    # The ranks extract together or not at all.
    if not all(gather_objects(found is not None)) or found is None:
        extracted = _extract(view, split)
        tensors = {"vectors": extracted.vectors, "kept": torch.tensor(extracted.kept)}
        if world().is_main:
            store.write(path, tensors if extracted.joint is None else tensors | {"joint": extracted.joint})
        return extracted
    kept = tuple(found["kept"].tolist())
    return Extracted(split.source, found["vectors"], found.get("joint"), kept, tuple(digests[i] for i in kept))


def _digest(source: Pairs, i: int) -> str:
    """Return the SHA-256 of an encoded image; "" where it cannot be read."""
    try:
        return hashlib.sha256(source.image(i)).hexdigest()
    except BrokenImage:
        return ""


def _extract(view: View, split: Split) -> Extracted:
    starts = range(0, len(split), view.batch_size)
    blocks = [range(start, min(start + view.batch_size, len(split))) for start in starts]
    vectors: list[Any] = []
    kept: list[int] = []
    digests: list[str] = []
    for samples in _mine(blocks):
        block = _block(split, view.preprocess, samples)
        if block.kept:
            frozen, joint = view.vectors(block.pixels)
            vectors.append((frozen.numpy(), None if joint is None else joint.numpy()))
        kept += block.kept
        digests += block.digests
    gathered = gather_objects((vectors, kept, digests))
    if not any(part[0] for part in gathered):
        raise UserError(
            f"none of the {len(split):,} images of the split '{split.name}' can be decoded: check the data."
        )
    features, joints = zip(*(pair for part in gathered for pair in part[0]), strict=True)
    return Extracted(
        split.source,
        finite(torch.cat([torch.from_numpy(v) for v in features]), view),
        None if joints[0] is None else torch.cat([torch.from_numpy(v) for v in joints]),
        tuple(i for part in gathered for i in part[1]),
        tuple(d for part in gathered for d in part[2]),
    )


def _block(split: Split, preprocess: Preprocess, samples: range) -> _Block:
    name = f"pixels/{preprocess.hash()}/{samples.start}:{samples.stop}"
    if name in split.cache:
        return cast(_Block, split.cache[name])

    def read(i: int) -> tuple[int, str, Tensor] | None:
        try:
            data = split.source.image(i)
            return i, hashlib.sha256(data).hexdigest(), preprocess(data)
        except BrokenImage:
            return None

    # Pillow, libjpeg-turbo and torch let other threads run while they decode and resize.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        rows = [row for row in pool.map(read, samples) if row is not None]
    pixels = torch.stack([row[2] for row in rows]) if rows else torch.empty(0)
    block = _Block(pixels, tuple(row[0] for row in rows), tuple(row[1] for row in rows))
    if len(split) * 3 * preprocess.size**2 <= MAX_CACHED_BYTES:
        split.cache[name] = block
    return block


def _each(split: Split, name: str, read: Callable[[int], T]) -> list[T]:
    """Return `read(i)` of every sample; each rank reads its part. Kept in `split.cache`."""
    if name not in split.cache:
        mine = [read(i) for i in _mine(range(len(split)))]
        split.cache[name] = [value for part in gather_objects(mine) for value in part]
    return cast(list[T], split.cache[name])


def _mine(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's contiguous part of `items`."""
    place = world()
    return items[place.rank * len(items) // place.size : (place.rank + 1) * len(items) // place.size]
