"""How well the order shuffles, and how it reads: `python -m bench.shuffle`.

Beside it: a full shuffle, and shards in random order through a shuffle buffer, which is what tar pipelines do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from altsight.data.order import BLOCK, Order

SIZE, SHARD, BUFFER, BATCH = 2_000_000, 10_000, 5_000, 256
Sequence = npt.NDArray[np.int64]


def ours(draw: np.random.Generator) -> Sequence:
    """One pass in the order of a run."""
    return Order(SIZE, int(draw.integers(2**31))).samples(np.arange(SIZE))


def full(draw: np.random.Generator) -> Sequence:
    """A permutation of all samples."""
    return draw.permutation(SIZE)


def buffered(draw: np.random.Generator) -> Sequence:
    """Shards in random order, read one after the other through a buffer from which a random sample is taken."""
    stream = (np.arange(SHARD) + SHARD * draw.permutation(SIZE // SHARD)[:, None]).ravel()
    out, buffer = np.empty(SIZE, np.int64), stream[:BUFFER].copy()
    places = draw.integers(0, BUFFER, SIZE)
    for n in range(SIZE - BUFFER):
        place = places[n]
        out[n] = buffer[place]
        buffer[place] = stream[BUFFER + n]
    out[SIZE - BUFFER :] = draw.permutation(buffer)
    return out


def measures(sequence: Sequence) -> dict[str, str]:
    """Return what is left of the order of the data set in a sequence of all its samples."""
    place = np.empty(SIZE, np.int64)
    place[sequence] = np.arange(SIZE)
    apart = np.abs(np.diff(place))
    moved = np.abs(place - np.arange(SIZE)) / SIZE
    blocks = sequence[: SIZE // BATCH * BATCH].reshape(-1, BATCH) // SHARD
    shards = np.mean([len(np.unique(row)) for row in blocks[:: len(blocks) // 500]])
    return {
        "neighbours in one batch of 256, a million": f"{1e6 * (np.diff(place // BATCH) == 0).mean():,.0f}",
        "neighbours less than 1,000 positions apart": f"{(apart < 1000).mean():.2%}",
        "median distance of neighbours": f"{np.median(apart):,.0f}",
        "displacement / size: median, 5 %": f"{np.median(moved):.3f}, {np.quantile(moved, 0.05):.3f}",
        "shards in a batch": f"{shards:.0f}",
    }


def bytes_read(ranks: int, by_stride: bool) -> float:
    """Return bytes read / bytes used by machines that read whole blocks, each once, and share nothing."""
    order = Order(SIZE, 0)
    positions = np.arange(order.window * (SIZE // order.window))
    each = BATCH // ranks
    owner = positions % ranks if by_stride else positions % BATCH // each
    window = positions // order.window
    blocks = order.samples(positions) // BLOCK
    keys = (window * ranks + owner) * (SIZE // BLOCK + 1) + blocks
    return len(np.unique(keys)) * BLOCK / len(positions)


def main() -> None:
    """Print both tables."""
    sequences: dict[str, Callable[[np.random.Generator], Sequence]] = {
        "this order": ours,
        "full shuffle": full,
        f"shards + buffer of {BUFFER:,}": buffered,
    }
    found = {name: measures(make(np.random.default_rng(0))) for name, make in sequences.items()}
    table = Table("", *found, title=f"{SIZE:,} samples in shards of {SHARD:,}")
    for what in next(iter(found.values())):
        table.add_row(what, *(measured[what] for measured in found.values()))
    reads = Table("machines", "this order", "contiguous parts of each batch", title="bytes read / bytes used")
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        reads.add_row(str(ranks), f"{bytes_read(ranks, True):.3f}", f"{bytes_read(ranks, False):.3f}")
    console = Console()
    console.print(table)
    console.print(f"Remote shards are read in blocks of {BLOCK} samples, about 4 MB at 30 KB a sample.\n")
    console.print(reads)


if __name__ == "__main__":
    main()
