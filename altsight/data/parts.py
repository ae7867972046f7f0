"""Passes over many shards: in parallel, remembered on disk shard by shard, put together at the end.

A pass that was interrupted goes on with the shards that are missing, and a prepared folder that gets more shards is
asked for what it knows of the others.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from altsight.core.config import from_dict, read_json, write_json
from altsight.core.errors import UserError
from altsight.data.images import NAME
from altsight.data.index import ROW, Rows, Shard
from altsight.data.scan import Reading, Scanned, scan_shard
from altsight.data.survey import Progress

SMALL = 2**26
"""Bytes of shards below which starting processes takes longer than reading them."""


@dataclass
class Parts:
    """What is known of shards. folder: where finished passes are kept. old: index rows of an earlier preparation."""

    folder: Path
    reading: Reading
    old: dict[str, tuple[Scanned, Rows]] = field(default_factory=dict)

    def scan(self, shards: Sequence[Shard], workers: int, skip_damaged: bool, progress: Progress) -> list[Scanned]:
        """Return what is in every one of `shards`, in order; only those that nothing is known of are read.

        Raises:
            UserError: some shards are damaged (all of them are read first). skip_damaged leaves them out instead.
        """
        now = {shard.path: (shard.size, shard.version) for shard in shards}
        self.old = {
            path: (found, rows)
            for path, (found, rows) in self.old.items()
            if now.get(path) == (found.shard.size, found.shard.version)
        }
        known = {shard.path: seen for shard in shards if (seen := self._known(shard)) is not None}
        missing = [shard for shard in shards if shard.path not in known]
        errors: dict[str, str] = {}
        self.folder.mkdir(exist_ok=True)
        try:
            for number, (shard, found) in enumerate(self._passes(missing, workers), start=len(known) + 1):
                if isinstance(found, UserError):
                    errors[shard.path] = str(found)
                else:
                    known[shard.path] = found
                progress("indexing shards", number, len(shards))
        finally:
            if not any(self.folder.glob("*.json")):
                self.remove()
        if errors and (not skip_damaged or not known):
            self._refuse(errors, len(shards))
        return [known[shard.path] for shard in shards if shard.path in known]

    def write_index(self, scanned: Sequence[Scanned], path: Path) -> None:
        """Write the rows of all shards, one after the other, as an array that can be mapped."""
        total = sum(found.shard.samples for found in scanned)
        if not total:
            np.save(path, np.empty(0, ROW))
            return
        rows, at = open_memmap(path, mode="w+", dtype=ROW, shape=(total,)), 0
        for found in scanned:
            rows[at : at + found.shard.samples] = self.rows(found)
            at += found.shard.samples
        rows.flush()

    def write_names(self, scanned: Sequence[Scanned], path: Path) -> None:
        """Write the names of all samples, sorted by hash."""
        at, parts = 0, [np.empty(0, NAME)]
        for found in scanned:
            names = np.fromfile(self._path(found.shard, ".names"), NAME)
            names["sample"] += np.uint64(at)
            parts.append(names)
            at += found.shard.samples
        names = np.concatenate(parts)
        np.save(path, names[np.argsort(names["name"], kind="stable")])

    def rows(self, found: Scanned) -> Rows:
        """Return the rows of one shard."""
        if found.shard.path in self.old:
            return self.old[found.shard.path][1]
        return np.fromfile(self._path(found.shard, ".rows"), ROW)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _known(self, shard: Shard) -> Scanned | None:
        if shard.path in self.old:
            return self.old[shard.path][0]
        path = self._path(shard, ".json")
        return from_dict(read_json(path), Scanned, str(path)) if path.exists() else None

    def _passes(self, shards: Sequence[Shard], workers: int) -> Iterator[tuple[Shard, Scanned | UserError]]:
        workers = min(workers, len(shards))
        if workers < 2 or sum(shard.size for shard in shards) < SMALL:
            for shard in shards:
                yield shard, self.one(shard)
            return
        # fork: a script that calls altsight at its top level is not run again by every process.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _leave_signals_to_parent) as pool:
            tasks = {pool.submit(self.one, shard): shard for shard in shards}
            try:
                for task in as_completed(tasks):
                    yield tasks[task], task.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def one(self, shard: Shard) -> Scanned | UserError:
        """Read one shard and remember what is in it; an error is a value here, so that the others go on."""
        try:
            with self._path(shard, ".rows").open("wb") as rows, self._path(shard, ".names").open("wb") as names:
                found = scan_shard(
                    shard, self.reading, lambda r: rows.write(r.tobytes()), lambda n: names.write(n.tobytes())
                )
        except UserError as error:
            return error
        write_json(self._path(shard, ".json"), asdict(found))
        return found

    def _path(self, shard: Shard, suffix: str) -> Path:
        """Return where what is known of `shard` is kept; another version of it, or another question, lies elsewhere."""
        text = json.dumps([asdict(shard) | {"samples": 0}, asdict(self.reading)], sort_keys=True)
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:24] + suffix)

    def _refuse(self, errors: dict[str, str], total: int) -> None:
        first = next(iter(errors.values()))
        if total == 1 or len(errors) == 1:
            raise UserError(first)
        names = ", ".join(os.path.basename(path) for path in list(errors)[:5])
        more = ", ..." if len(errors) > 5 else ""
        raise UserError(
            f"{len(errors)} of {total:,} shards cannot be read ({names}{more}): mend or remove them, or leave them out "
            f"with --skip-damaged; the first one says: {first}"
        )


def _leave_signals_to_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that was called decides what becomes of the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
