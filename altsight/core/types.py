"""The few types that the floors pass to each other."""

from __future__ import annotations

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


@dataclass(slots=True)
class Outputs:
    """What `Method.embed` hands to the loop for one micro-batch.

    shared: tensors with the micro-batch along dimension 0 that `Method.loss` compares across the global batch.
    local: name -> the *sum* of that loss over the micro-batch (0-d, fp32); the loop divides it by the global count
        of the same name from `Method.counts`.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
