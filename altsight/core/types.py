"""The few types that the floors pass to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text in a document."""

    value: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a document, still encoded (the bytes of a JPEG, PNG, WebP ... file)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """Parts in reading order: an image-text pair is the two-part case, an image alone the one-part case."""

    parts: tuple[Text | Image, ...]
    id: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[bytes, ...]:
        """The encoded bytes of every image, in order."""
        return tuple(part.data for part in self.parts if isinstance(part, Image))

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text, in order."""
        return tuple(part.value for part in self.parts if isinstance(part, Text))


Example = dict[str, Tensor]
"""One prepared sample: named tensors without a batch dimension; images are uint8 (3, H, W)."""


@dataclass(slots=True)
class Batch:
    """Stacked examples: every tensor has the samples along dimension 0."""

    tensors: dict[str, Tensor]
    positions: Tensor
    """(B,) int64, on the CPU: the position of each sample in the run."""
    samples: Tensor
    """(B,) int64, on the CPU: the index in the data set of the sample that was used at each position."""
    bad: tuple[str, ...] = ()
    """Where the unusable samples lie that were replaced in this batch, and why."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """Return the tensor called `name`, or None where the batch has none."""
        return self.tensors.get(name)

    def part(self, start: int, stop: int) -> Batch:
        """Return samples start..stop (a view, no copy)."""
        tensors = {name: t[start:stop] for name, t in self.tensors.items()}
        return Batch(tensors, self.positions[start:stop], self.samples[start:stop])

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory, from which a GPU copies without waiting."""
        tensors = {name: t.pin_memory() for name, t in self.tensors.items()}
        return Batch(tensors, self.positions, self.samples, self.bad)

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        tensors = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return Batch(tensors, self.positions, self.samples, self.bad)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `step` of `steps` optimizer steps are done."""

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step / max(self.steps, 1), 1.0)

    def cosine(self, start: float, end: float) -> float:
        """Return the value on a half cosine from `start` at the first step to `end` after the last."""
        return end + (start - end) * (1 + math.cos(math.pi * self.fraction)) / 2

    def ramp(self, start: float, end: float, until: float) -> float:
        """Return the value on a line from `start` at the first step to `end` at the share `until`, then `end`."""
        return end if self.fraction >= until else start + (end - start) * self.fraction / until


@dataclass(slots=True)
class Outputs:
    """What `Method.embed` hands to the loop for one micro-batch.

    shared: tensors of rows that `Method.loss` compares across the global batch. The rows of consecutive micro-batches
        are put one after the other; how many rows a sample has is up to the method (its crops, its masked patches).
    local: name -> the *sum* of that loss over the micro-batch (0-d, fp32); the loop divides it by the global count
        of the same name from `Method.counts`.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
