"""Workers, collation, prefetch and the wait meter: positions in, uint8 batches out.

The loader has no state but the position to start from. What a batch holds depends on its positions alone, never on
the number of workers or ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Batch, Document, Example
from altsight.data.decode import BrokenImage
from altsight.data.order import Order
from altsight.data.sources import Pairs

Prepare = Callable[[Document, Key], Example | None]
"""A method's preparation of one document; None (or `BrokenImage`) when the document is of no use to the method."""

MAX_ATTEMPTS = 100
"""Unusable samples in a row at one position after which the data set is taken to be of no use."""


@dataclass(frozen=True)
class _Positions(Dataset[Batch | UserError]):
    """Map-style data set over positions; one item is a whole batch."""

    source: Pairs
    order: Order
    prepare: Prepare

    def __getitem__(self, positions: range) -> Batch | UserError:
        # A UserError travels back as a value: raised here, DataLoader would bury it in a worker's traceback.
        try:
            return self._batch(positions)
        except UserError as error:
            return error

    def _batch(self, positions: range) -> Batch:
        examples, samples, bad = [], [], []
        first = self.order.samples(np.array(positions))
        for position, sample in zip(positions, first.tolist(), strict=True):
            example, sample, reasons = self._example(position, sample)
            examples.append(example)
            samples.append(sample)
            bad += reasons
        tensors = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        return Batch(tensors, torch.tensor(list(positions)), torch.tensor(samples), tuple(bad))

    def _example(self, position: int, sample: int) -> tuple[Example, int, list[str]]:
        """Return the example at `position`, the sample that it came from, and why samples before it were unusable.

        `sample` is the one that the order names; a replacement is drawn where it is of no use.
        """
        at = key(self.order.seed, position)
        bad: list[str] = []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                example = self.prepare(self.source.document(sample, at), at)
                reason = "nothing in it that this method can use"
            except BrokenImage as error:
                example, reason = None, f"broken image: {error}"
            if example is not None:
                return example, sample, bad
            bad.append(f"{self.source.index.name(sample)} ({reason})")
            sample = self.order.sample(position, attempt)
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row are unusable, the last one {bad[-1]}: run `altsight check` on the data."
        )


def check_batch(batch: int, size: int, where: str) -> None:
    """Raise UserError if a global batch of `batch` samples cannot be drawn from the `size` samples at `where`."""
    if batch < 1:
        raise UserError(f"the batch of {batch} is no batch: use 1 or more.")
    if batch > size:
        raise UserError(
            f"the batch of {batch:,} is larger than the data set '{where}' of {size:,} samples: use a batch of at most "
            f"{size:,}, or prepare more data."
        )


@dataclass(frozen=True)
class Loader:
    """Batches of this rank's contiguous part of every global batch.

    global_batch: samples of one step over all ranks. workers: processes that decode ahead; 0 decodes in this one.
    """

    source: Pairs
    order: Order
    prepare: Prepare
    global_batch: int
    workers: int = 0
    pin_memory: bool = False

    def batches(self, place: World, samples_seen: int, samples: int) -> Iterator[tuple[Batch, float]]:
        """Yield (batch, seconds waited for it) from position `samples_seen` up to `samples`, in whole steps.

        Raises:
            UserError: the global batch is not divisible by the world size, or the data cannot be used.
        """
        if self.global_batch % place.size:
            raise UserError(
                f"the batch of {self.global_batch} cannot be split over {place.size} ranks: use a multiple of it."
            )
        mine = self.global_batch // place.size
        starts = range(samples_seen, samples - self.global_batch + 1, self.global_batch)
        parts = [range(s + place.rank * mine, s + (place.rank + 1) * mine) for s in starts]
        loader = DataLoader(
            _Positions(self.source, self.order, self.prepare),
            batch_size=None,
            sampler=parts,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
            # Without a generator of its own, DataLoader would draw from torch's global one.
            generator=torch.Generator(),
        )
        before = time.perf_counter()
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch, time.perf_counter() - before
            before = time.perf_counter()
