"""An index of 400 million samples: size, memory, time to open and time per look-up: `python -m bench.index`.

The index is made up (40,000 shards of 10,000 samples in a bucket that nobody asks), but opened, mapped and looked up
by the code that a run uses. It takes 6.4 GB of disk in the temporary folder, or in the one given with --folder.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from altsight.data.index import ROW, Index, Shard
from altsight.data.prepared import INDEX, Contents, open_prepared, write_contents, write_shards
from altsight.data.scan import Scanned

PER_SHARD = 10_000
SAMPLE_BYTES = 30_720


@dataclass(frozen=True)
class Options:
    """What is measured."""

    samples: int = 400_000_000
    folder: Path = Path(tempfile.gettempdir())


def made_up(samples: int, folder: Path) -> None:
    """Write a prepared folder with `samples` samples."""
    rows = np.lib.format.open_memmap(folder / INDEX, mode="w+", dtype=ROW, shape=(samples,))
    for start in range(0, samples, 10**7):
        part = rows[start : start + 10**7]
        part["at"] = np.arange(len(part), dtype=np.uint64) % PER_SHARD * SAMPLE_BYTES
        part["size"], part["check"] = SAMPLE_BYTES, 0
    rows.flush()
    del rows
    write_shards(folder, made_up_shards(samples))
    write_contents(folder, Contents("pairs", "made up", {"samples": samples}, captions=("{txt}",)))


def made_up_shards(samples: int) -> Iterator[Scanned]:
    """Yield the shards that `samples` samples lie in."""
    for number in range(samples // PER_SHARD):
        path = f"s3://corpus/{number:05d}.tar"
        yield Scanned(Shard(path, "tar", PER_SHARD * SAMPLE_BYTES, "etag", PER_SHARD), PER_SHARD, PER_SHARD)


def memory() -> tuple[int, int]:
    """Return bytes of this process that are its own, and bytes that are mapped from files and can be dropped."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return values["Anonymous"], values["Rss"] - values["Anonymous"]


def per_look_up(index: Index, count: int, seed: int) -> float:
    """Return seconds that it takes to find out where a random sample lies."""
    samples = np.random.default_rng(seed).integers(0, len(index), count).tolist()
    start = time.perf_counter()
    for i in samples:
        index.name(i)
    return (time.perf_counter() - start) / count


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget what it holds of a file."""
    import os

    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the table."""
    options = tyro.cli(Options, description=__doc__)
    table = Table("what", "figure", title=f"an index of {options.samples:,} samples")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        made_up(options.samples, folder)
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
        table.add_row("bytes on disk a sample", f"{on_disk / options.samples:.2f}")
        drop_pages(folder / INDEX)
        own, mapped = memory()
        start = time.perf_counter()
        prepared = open_prepared(folder)
        table.add_row("open", f"{time.perf_counter() - start:.2f} s")
        source = prepared.source
        index = source.index  # type: ignore[attr-defined]
        table.add_row("look-up, nothing in memory", f"{1e6 * per_look_up(index, 2000, 0):.0f} us")
        table.add_row("look-up", f"{1e6 * min(per_look_up(index, 20_000, 1) for _ in range(3)):.1f} us")
        order = source.order(0)
        start = time.perf_counter()
        for step in range(1000):
            order.samples(np.arange(step * 10**5, step * 10**5 + 256))
        table.add_row("order of a batch of 256", f"{time.perf_counter() - start:.2f} ms")
        own_now, mapped_now = memory()
        table.add_row("memory of its own", f"{(own_now - own) / 2**20:.0f} MiB")
        table.add_row("of it a sample", f"{(own_now - own) / options.samples:.3f} bytes")
        table.add_row("pages mapped from the file, which can be dropped", f"{(mapped_now - mapped) / 2**20:.0f} MiB")
        table.add_row("pickled, as spawned workers get it", f"{len(pickle.dumps(source)) / 2**20:.1f} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
