"""Workers, collation, prefetch and the wait meter: positions in, uint8 batches out.

The loader has no state but the position to start from. What a batch holds depends on its positions alone, never on
the number of workers or ranks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Batch, Document, Example
from altsight.data.decode import BrokenImage
from altsight.data.order import MixedOrder, Order
from altsight.data.sources import Source
from altsight.data.survey import THREADS
from altsight.data.watch import DECODING, IDLE, READING, Board, Watch

Prepare = Callable[[Document, Key], Example | None]
"""A method's preparation of one document; None (or `BrokenImage`) when the document is of no use to the method."""

MAX_ATTEMPTS = 100
"""Unusable samples in a row at one position after which the data set is taken to be of no use."""
GRACE = 3.0
"""Seconds that a process which decodes goes on after it was asked to end."""


@dataclass(frozen=True)
class _Positions(Dataset[Batch | UserError]):
    """Map-style data set over positions; one item is a whole batch. limit: seconds that it may take."""

    source: Source
    order: Order | MixedOrder
    prepare: Prepare
    board: Board
    limit: float

    def __getitem__(self, positions: range) -> Batch | UserError:
        # A UserError travels back as a value: raised here, DataLoader would bury it in a worker's traceback.
        try:
            return self._batch(positions)
        except UserError as error:
            return error

    def _batch(self, positions: range) -> Batch:
        examples, samples, bad = [], [], []
        began, worker = time.monotonic(), _worker()
        with self._reading(positions) as pending:
            for position, sample, read in pending:
                example, sample, reasons = self._example(position, sample, read)
                examples.append(example)
                samples.append(sample)
                bad += reasons
                if time.monotonic() - began > self.limit:
                    raise _stalled(self.board.tell(worker, self.source.name), self.limit)
        self.board.note(worker, IDLE)
        tensors = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        return Batch(tensors, torch.tensor(list(positions)), torch.tensor(samples), tuple(bad))

    @contextmanager
    def _reading(self, positions: range) -> Iterator[list[tuple[int, int, Callable[[], Document]]]]:
        """Yield (position, sample, how to get its document); many are on their way at once where reading is slow."""
        samples = self.order.samples(np.array(positions)).tolist()
        calls: list[tuple[int, int, Callable[[], Document]]] = [
            (position, sample, functools.partial(self.source.document, sample, key(self.order.seed, position)))
            for position, sample in zip(positions, samples, strict=True)
        ]
        if not self.source.is_remote:
            yield calls
            return
        pool = ThreadPoolExecutor(THREADS)
        try:
            yield [(position, sample, pool.submit(call).result) for position, sample, call in calls]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _example(self, position: int, sample: int, read: Callable[[], Document]) -> tuple[Example, int, list[str]]:
        """Return the example at `position`, the sample that it came from, and why samples before it were unusable.

        `sample` is the one that the order names; a replacement is drawn where it is of no use.
        """
        at = key(self.order.seed, position)
        bad: list[str] = []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                self.board.note(_worker(), READING, sample)
                document = read()
                self.board.note(_worker(), DECODING, sample)
                example = self.prepare(document, at)
                reason = "nothing in it that this method can use"
            except BrokenImage as error:
                example, reason = None, f"broken image: {error}"
            if example is not None:
                return example, sample, bad
            bad.append(f"{self.source.name(sample)} ({reason})")
            sample = self.order.sample(position, attempt)
            read = functools.partial(self.source.document, sample, at)
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row are unusable, the last one {bad[-1]}: run `altsight check` on the data."
        )


def _worker() -> int:
    info = get_worker_info()
    return info.id if info is not None else 0


def _stalled(doing: str, limit: float) -> UserError:
    return UserError(
        f"no data came for {limit:g} s, {doing}: look after the disk or the network, or raise --data.stall-limit."
    )


def _outlive_the_signal(worker: int) -> None:
    """Let a process that decodes go on for a while after SIGTERM, which schedulers send to all processes of a run.

    The run needs its batch to end the step that it is in and to save. A thread waits for the signal, since the main one
    may be stuck in a read.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def leave() -> None:
        signal.sigwait({signal.SIGTERM})
        time.sleep(GRACE)
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()


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
class _Parts:
    """The positions of a rank in every step from `seen` to `samples`, made one after the other: runs are long."""

    seen: int
    samples: int
    batch: int
    place: World

    def __iter__(self) -> Iterator[range]:
        for start in range(self.seen, self.samples - self.batch + 1, self.batch):
            yield range(start + self.place.rank, start + self.batch, self.place.size)


@dataclass(frozen=True)
class Loader:
    """Batches of this rank's part of every global batch: every R-th position, so that ranks read different blocks.

    global_batch: samples of one step over all ranks. workers: processes that decode ahead; 0 decodes in this one.
    late: seconds after which `say` is told what a batch waits for. limit: seconds after which the run stops.
    """

    source: Source
    order: Order | MixedOrder
    prepare: Prepare
    global_batch: int
    workers: int = 0
    pin_memory: bool = False
    late: float = 30.0
    limit: float = 600.0
    say: Callable[[str], None] = print

    def batches(self, place: World, samples_seen: int, samples: int) -> Iterator[tuple[Batch, float]]:
        """Yield (batch, seconds waited for it) from position `samples_seen` up to `samples`, in whole steps.

        Raises:
            UserError: the global batch is not divisible by the world size, the data cannot be used, or none come.
        """
        if self.workers < 0:
            raise UserError(f"{self.workers} processes cannot decode: use --data.workers 0 or more.")
        if self.global_batch % place.size:
            raise UserError(
                f"the batch of {self.global_batch} cannot be split over {place.size} ranks: use a multiple of it."
            )
        parts = _Parts(samples_seen, samples, self.global_batch, place)
        board = Board.of(self.workers)
        watch = Watch(board, self.source.name, self.late, self.say)
        batches = iter(self._loader(parts, board))
        for number, part in enumerate(parts):
            worker = number % max(1, self.workers)
            before = time.perf_counter()
            with watch.over(part.start, worker):
                batch = self._next(batches, board, worker)
            yield batch, time.perf_counter() - before

    def _loader(self, parts: _Parts, board: Board) -> DataLoader[Batch | UserError]:
        limit = float("inf") if self.workers else self.limit
        return DataLoader(
            _Positions(self.source, self.order, self.prepare, board, limit),
            batch_size=None,
            sampler=parts,
            num_workers=self.workers,
            worker_init_fn=_outlive_the_signal,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
            timeout=self.limit if self.workers else 0,
            # Without a generator of its own, DataLoader would draw from torch's global one.
            generator=torch.Generator(),
        )

    def _next(self, batches: Any, board: Board, worker: int) -> Batch:
        try:
            batch: Batch | UserError = next(batches)
        except RuntimeError as error:
            # Now, and not when it is collected: torch would raise the same again there, where nobody can catch it.
            with contextlib.suppress(RuntimeError):
                batches._shutdown_workers()
            if "timed out" in str(error):
                raise _stalled(board.tell(worker, self.source.name), self.limit) from None
            if "exited unexpectedly" in str(error) or "is killed by signal" in str(error):
                raise UserError(
                    f"a process that decodes images died ({str(error).splitlines()[0]}), "
                    f"{board.tell(worker, self.source.name)}: most often memory ran out, so lower --data.workers."
                ) from None
            raise
        if isinstance(batch, UserError):
            raise batch
        return batch
