"""The watchdog: when a batch is late, which worker it waits for, and what that worker is doing with which sample."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

STAGES = ("between two batches", "reading", "decoding")
IDLE, READING, DECODING = range(len(STAGES))


@dataclass(frozen=True)
class Board:
    """What every worker is doing, in memory that all processes share.

    rows: (workers, 3) int64: stage, sample, since when (nanoseconds of the monotonic clock, which processes share).
    """

    rows: Tensor

    @classmethod
    def of(cls, workers: int) -> Board:
        """Return a board for `workers` processes; 0 is the loop's own process."""
        return cls(torch.zeros((max(1, workers), 3), dtype=torch.int64).share_memory_())

    def note(self, worker: int, stage: int, sample: int = 0) -> None:
        """Write down what `worker` begins to do."""
        self.rows.numpy()[worker] = stage, sample, time.monotonic_ns()

    def tell(self, worker: int, name: Callable[[int], str]) -> str:
        """Return in words what `worker` is doing; `name` says where a sample lies."""
        stage, sample, since = self.rows[worker].tolist()
        if not since:
            return f"worker {worker} has not begun"
        what = STAGES[stage] + (f" {name(sample)}" if stage else "")
        return f"worker {worker} has been {what} for {(time.monotonic_ns() - since) / 1e9:.0f} s"


@dataclass(frozen=True)
class Watch:
    """Says when a batch is late.

    late: seconds after which it says so. say: where to.
    """

    board: Board
    name: Callable[[int], str]
    late: float
    say: Callable[[str], None] = field(default=lambda words: None)

    @contextmanager
    def over(self, position: int, worker: int) -> Iterator[None]:
        """Watch the body wait for the batch that begins at `position`, which `worker` makes."""
        words = f"the batch at sample {position:,} is late by {self.late:g} s"
        timer = threading.Timer(self.late, lambda: self.say(f"{words}: {self.board.tell(worker, self.name)}"))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
