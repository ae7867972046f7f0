"""One pass over the text of a data set: counts, lengths, classes, and the captions for the tokenizer to learn from."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.data.sources import Pairs, require_text
from altsight.data.text import Tokenizer

PERCENTILES = (0, 1, 5, 50, 95, 99, 100)

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


@dataclass
class Survey:
    """One pass over the text and the labels of all samples of `source`, whose name in messages is `where`.

    needs_text: data without a single caption are an error.
    """

    source: Pairs
    where: str
    needs_text: bool
    captioned: int = 0
    characters: array[int] = field(default_factory=lambda: array("I"))
    names: set[str] = field(default_factory=set)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes met, sorted."""
        return tuple(sorted(self.names))

    def run(self, progress: Progress) -> None:
        """Make the pass.

        Raises:
            UserError: text or labels are asked for, and no sample has any.
        """
        for _ in self.captions(progress):
            pass

    def captions(self, progress: Progress) -> Iterator[str]:
        """Make the pass and yield every caption on the way; raises what `run` raises, at the end."""
        size = len(self.source)
        for i in range(size):
            values = self.source.values(i)
            captions = self.source.captions(values)
            self.captioned += bool(captions)
            self.characters.extend(map(len, captions))
            self.names.add(self.source.class_name(values))
            yield from captions
            _tick("reading captions", i + 1, size, progress)
        self.names.discard("")
        if self.needs_text:
            require_text(self.captioned, size, self.where, self.source.fields(0))
        if self.source.label and not self.names:
            known = ", ".join(sorted(self.source.fields(0)))
            raise UserError(
                f"no sample of '{self.where}' has the label field '{self.source.label}': give --label a field that its "
                f"samples have ({known or 'no JSON field found'})."
            )

    def statistics(self) -> dict[str, Any]:
        """Return counts and percentiles of what the pass has met."""
        return {
            "samples": len(self.source),
            "with_caption": self.captioned,
            "captions": len(self.characters),
            "caption_characters": percentiles(self.characters),
            "image_bytes": percentiles(self.source.index.samples["image_size"]),
        }


def token_counts(source: Pairs, tokenizer: Tokenizer, progress: Progress) -> list[int]:
    """Return the number of tokens of every caption, start and end included."""
    counts = []
    for i in range(len(source)):
        counts += [tokenizer.count(caption) for caption in source.all_captions(i)]
        _tick("counting tokens", i + 1, len(source), progress)
    return counts


def _tick(what: str, done: int, total: int, progress: Progress) -> None:
    if done % 1000 == 0 or done == total:
        progress(what, done, total)
