"""Tables as columns: Parquet, and the Arrow files of a Hugging Face `datasets` folder; a sample is a row.

A Parquet file can be read by row groups only, and remote files only in large pieces. A group that was read is kept as
an Arrow file in the local cache, from where single rows are mapped into memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from altsight.core.errors import UserError
from altsight.data import files
from altsight.data.cache import Cache

HELD = 4
"""Row groups that a process holds in memory where there is no cache."""


def scan_columns(path: str, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, fields) of every row.

    Raises:
        UserError: the file is damaged.
    """
    at = 0
    for table in _tables(path, kind):
        for batch in table.to_batches(max_chunksize=64):
            for fields in batch.to_pylist():
                yield at, fields
                at += 1


def read_row(path: str, kind: str, at: int, cache: Cache | None) -> dict[str, Any]:
    """Return the fields of row `at`.

    Raises:
        UserError: the file is gone or damaged.
    """
    if kind == "arrow":
        table = _mapped(_local(path, cache))
    else:
        starts = _group_starts(path)
        group = int(np.searchsorted(starts, at, side="right")) - 1
        at -= int(starts[group])
        if cache is None:
            table = _held_group(path, group)
        else:
            table = _mapped(cache.path(f"{path}#row group {group}", lambda: _as_arrow(path, group)))
    fields: dict[str, Any] = table.slice(at, 1).to_pylist()[0]
    return fields


def _tables(path: str, kind: str) -> Iterator[Any]:
    if kind == "arrow":
        yield _mapped(_local(path, None))
        return
    for group in range(len(_group_starts(path)) - 1):
        yield _read_group(path, group)


def _local(path: str, cache: Cache | None) -> Path:
    """Return where an Arrow file can be mapped from."""
    if not files.is_remote(path):
        return Path(path)
    if cache is None:
        raise UserError(f"'{path}' is remote and can only be read through the cache: raise --data.cache-gb.")
    return cache.path(path, lambda: files.open_stream(path).read())


@functools.lru_cache(maxsize=32)
def _mapped(path: Path) -> Any:
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # `datasets` writes streams
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(str(path), error) from None


@functools.lru_cache(maxsize=64)
def _metadata(path: str) -> Any:
    return _open(path, None).metadata


@functools.lru_cache(maxsize=64)
def _group_starts(path: str) -> Any:
    """Return the first row of every row group, and the number of rows."""
    metadata = _metadata(path)
    return np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])


def _open(path: str, metadata: Any) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(pa.PythonFile(files.open_stream(path), mode="r"), metadata=metadata)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _read_group(path: str, group: int) -> Any:
    import pyarrow as pa

    # A file of its own for every read: threads and forked workers share no position.
    try:
        with _open(path, _metadata(path)) as file:
            return file.read_row_group(group, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


@functools.lru_cache(maxsize=HELD)
def _held_group(path: str, group: int) -> Any:
    return _read_group(path, group)


def _as_arrow(path: str, group: int) -> bytes:
    import pyarrow as pa

    table = _read_group(path, group)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _damaged(path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"the shard '{path}' is truncated or damaged ({reason}): download it again or remove it.")
