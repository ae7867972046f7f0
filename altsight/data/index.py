"""The index: where every sample of a corpus lies, found once and read by range afterwards.

16 bytes a sample in one array, mapped from disk: a corpus of 400 million samples takes 6.4 GB there and next to
nothing in memory. What is read is compared with the checksum that was taken when it was indexed.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.data import files
from altsight.data.cache import Cache
from altsight.data.columns import read_row
from altsight.data.lines import parse_line
from altsight.data.order import BLOCK
from altsight.data.record import BrokenSample, Record, checksum, table_record
from altsight.data.tar import parse_tar

ROW = np.dtype([("at", "<u8"), ("size", "<u4"), ("check", "<u4")])
"""One sample: its first byte (its row number in Parquet and Arrow), its bytes, a checksum over them."""
Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of samples. kind: tar, parquet, arrow, csv, tsv or jsonl.

    size and version: what the file was when it was indexed (`files.stamp`). header: columns of a CSV or TSV file.
    """

    path: str
    kind: str
    size: int
    version: str = ""
    samples: int = 0
    header: tuple[str, ...] = ()
    image_field: str = ""


@dataclass(frozen=True)
class Index:
    """The samples of some shards, in shard order.

    file: where `rows` are mapped from, if they are. cache: local copies of remote blocks. every: take only every n-th.
    """

    shards: tuple[Shard, ...]
    rows: Rows = field(repr=False)
    file: Path | None = None
    cache: Cache | None = None
    every: int = 1

    def __len__(self) -> int:
        return -(-len(self.rows) // self.every)

    def __reduce__(self) -> tuple[Any, ...]:
        # An array that is mapped from a file would be pickled with all of its content.
        rows = self.rows if self.file is None else None
        return _unpickle, (self.shards, rows, self.file, self.cache, self.every)

    @functools.cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """(shards + 1,): the first row of every shard, and the number of rows."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @functools.cached_property
    def is_remote(self) -> bool:
        """True where a read may take long, so that many should be under way at once."""
        return any(files.is_remote(shard.path) for shard in self.shards)

    def parts(self) -> dict[str, int]:
        """Return the number of samples in every shard, by its path below the folder that all lie in."""
        homes = sorted({files.parent(shard.path) for shard in self.shards})
        home = os.path.commonpath(homes) if not self.is_remote else homes[0] if len(homes) == 1 else ""
        return {shard.path.removeprefix(home).lstrip("/"): shard.samples for shard in self.shards}

    def thinned(self, most: int) -> Index:
        """Return the index of every n-th sample, with the smallest n that leaves at most `most`."""
        return replace(self, every=self.every * max(1, -(-len(self) // most)))

    def cached(self, cache: Cache | None) -> Index:
        """Return the index with its remote blocks kept in `cache`."""
        return replace(self, cache=cache)

    def record(self, i: int) -> Record:
        """Read sample `i`.

        Raises:
            BrokenSample: it is no longer what was indexed.
            UserError: its shard is gone.
        """
        row, shard = self.rows[i * self.every], self.shards[self._shard_of(i)]
        if shard.kind in ("parquet", "arrow"):
            fields = read_row(shard.path, shard.kind, int(row["at"]), self.cache)
            if checksum(fields) != row["check"]:
                raise BrokenSample("the row is not the one that was indexed")
            return table_record(fields, shard.image_field)
        data = self._bytes(i, row, shard)
        if shard.kind == "tar":
            return parse_tar(data)
        return table_record(parse_line(data, shard.kind, shard.header), shard.image_field)

    def name(self, i: int) -> str:
        """Return 'shard#place', which finds sample `i` again: a byte, or the row in Parquet and Arrow."""
        return f"{self.shards[self._shard_of(i)].path}#{self.rows[i * self.every]['at']}"

    def _shard_of(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i * self.every, side="right")) - 1

    def _bytes(self, i: int, row: np.void, shard: Shard) -> bytes:
        at, size = int(row["at"]), int(row["size"])
        if self.cache is None or not files.is_remote(shard.path):
            data = files.read(shard.path, at, size)
            if checksum(data) == row["check"]:
                return data
        else:
            name, start, stop = self._block(i, shard)
            fetch = functools.partial(files.read, shard.path, start, stop - start)
            for again in (False, True):  # a block that was damaged on its way, or in the cache, is fetched once more
                if again:
                    self.cache.drop(name)
                data = self.cache.read(name, at - start, size, fetch)
                if checksum(data) == row["check"]:
                    return data
        raise BrokenSample("the bytes are not those that were indexed")

    def _block(self, i: int, shard: Shard) -> tuple[str, int, int]:
        """Return the name and the bytes start..stop of the block of neighbours that sample `i` is read with."""
        number, block = self._shard_of(i), i * self.every // BLOCK
        first = max(block * BLOCK, int(self.starts[number]))
        last = min((block + 1) * BLOCK, int(self.starts[number + 1])) - 1
        start, end = self.rows[first], self.rows[last]
        name = f"{shard.path}#{shard.version}#{shard.size}#{start['at']}"
        return name, int(start["at"]), int(end["at"]) + int(end["size"])


def open_index(shards: Sequence[Shard], file: Path, again: str) -> Index:
    """Map the index in `file`; `again` says in the error what to do.

    Raises:
        UserError: the file is damaged or belongs to other shards.
    """
    try:
        rows = _map(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the index '{file}' cannot be read ({error}): {again}.") from None
    index = Index(tuple(shards), rows, file)
    if rows.dtype != ROW or len(rows) != index.starts[-1]:
        raise UserError(f"the index '{file}' does not belong to the shards listed beside it: {again}.")
    return index


def _map(file: Path) -> Rows:
    """Map an array that is looked up here and there: read only the pages that are asked for, none around them."""
    rows: Rows = np.load(file, mmap_mode="r")
    if isinstance(rows.base, mmap.mmap):
        rows.base.madvise(mmap.MADV_RANDOM)
    return rows


def _unpickle(
    shards: tuple[Shard, ...], rows: Rows | None, file: Path | None, cache: Cache | None, every: int
) -> Index:
    if file is not None:
        rows = _map(file)
    assert rows is not None
    return Index(shards, rows, file, cache, every)
