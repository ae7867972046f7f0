"""A look at the text of a data set: lengths, and the captions that a tokenizer learns from."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.data.order import BLOCK
from altsight.data.sources import Source
from altsight.data.text import Tokenizer

PERCENTILES = (0, 1, 5, 50, 95, 99, 100)
SURVEYED = 100_000
"""Samples that are looked at, in blocks spread evenly over the data; all of them where there are no more."""
THREADS = 16
"""Remote samples that are read at once."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


def percentiles(values: npt.ArrayLike) -> dict[str, float]:
    """Return "p0" (least), "p1", "p5", "p50", "p95", "p99", "p100" (most) of `values`; {} where there are none."""
    numbers = np.asarray(values)
    if not numbers.size:
        return {}
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, np.percentile(numbers, PERCENTILES), strict=True)}


def spread(size: int, most: int) -> npt.NDArray[np.int64]:
    """Return about `most` of 0 .. size - 1, sorted, in whole blocks at equal distances; all where there are no more."""
    if size <= most:
        return np.arange(size)
    starts = np.linspace(0, size - BLOCK, max(1, most // BLOCK)).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(BLOCK)).clip(0, size - 1))


@dataclass
class Survey:
    """The texts of the samples that are looked at."""

    source: Source
    progress: Progress = silent
    characters: array[int] = field(default_factory=lambda: array("I"))

    def texts(self) -> Iterator[str]:
        """Yield every text, and count its characters."""
        for text in self._read("reading captions"):
            self.characters.append(len(text))
            yield text

    def statistics(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Return the percentiles of lengths of texts; those in tokens take another pass."""
        if not self.characters:
            for _ in self.texts():
                pass
        found: dict[str, Any] = {"caption_characters": percentiles(self.characters)}
        if tokenizer is not None:
            found["caption_tokens"] = percentiles([tokenizer.count(text) for text in self._read("counting tokens")])
        return found

    def _read(self, what: str) -> Iterator[str]:
        samples = spread(len(self.source), SURVEYED).tolist()
        done = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(samples), 1000):
                part = samples[start : start + 1000]
                read = pool.map(self.source.texts, part) if self.source.is_remote else map(self.source.texts, part)
                for texts in read:
                    yield from texts
                done += len(part)
                self.progress(what, done, len(samples))
