"""Position -> sample: a pure function of (seed, position), with no state and no epoch to count.

Every pass over the data is a fresh permutation. It is drawn in two steps so that neighbouring positions still read
from few places: blocks of neighbouring samples are permuted among each other, then the samples of a window of
consecutive permuted blocks are mixed. A window is dealt out to `lanes`: positions p with the same p % lanes draw from
the same few blocks. Rank r takes every R-th position, so on a cluster no two ranks read the same block, and yet the
sequence does not depend on the number of ranks. All permutations are keyed Feistel networks, evaluated in O(1) for a
single position; nothing of the size of the data set is held in memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altsight.core.rng import key

Ints = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

BLOCK = 128
"""Neighbouring samples that move, and are read from a remote shard, together."""
LANES = 64
"""Parts of a window that share no block; the largest number of ranks that never read the same bytes."""
CYCLE = 1024
"""Positions of one lane after which a mixture has met its weights exactly; weights are rounded to 1 / CYCLE."""
_ROUNDS = 6
_RANKED = 256
"""Up to this size a permutation is the ranking of keyed hashes: a Feistel network is biased in domains that small."""


@dataclass(frozen=True)
class Order:
    """The order of a data set of `size` samples under `seed`.

    block: how many neighbouring samples move together before they are mixed in the window.
    window: how many samples are mixed; a multiple of `block`. Data sets that fit in one window are fully shuffled.
    stream: tells the orders of the sources of a mixture apart.
    """

    size: int
    seed: int
    block: int = BLOCK
    window: int = 512 * BLOCK
    stream: int = 0

    @property
    def lanes(self) -> int:
        """Parts that a window is dealt out to: LANES where it holds that many blocks or a multiple."""
        return math.gcd(LANES, self.window // self.block)

    def sample(self, position: int, attempt: int = 0) -> int:
        """Return the index of the sample at `position`; `attempt` > 0 asks for a replacement of an unusable one."""
        if attempt:
            at = _hash(np.array([position], dtype=np.uint64), self._key(attempt, "replacement"))
            return int(at[0] % np.uint64(self.size))
        return int(self.samples(np.array([position]))[0])

    def samples(self, positions: Positions) -> Positions:
        """Return the indices of the samples at `positions` (n,)."""
        out = np.empty(len(positions), dtype=np.int64)
        passes = positions // self.size
        for number in np.unique(passes):
            chosen = passes == number
            out[chosen] = self._in_pass(int(number), positions[chosen] - number * self.size)
        return out

    def _in_pass(self, number: int, offsets: Positions) -> Positions:
        """Permute [0, size): what falls into the gap after the last, short block walks on until it is a sample."""
        samples = self._in_whole_blocks(number, offsets)
        while (gap := samples >= self.size).any():
            samples[gap] = self._in_whole_blocks(number, samples[gap])
        return samples

    def _in_whole_blocks(self, number: int, offsets: Positions) -> Positions:
        """Permute [0, blocks * block), where the last block may reach past the last sample."""
        block = min(self.block, self.size)
        blocks = -(-self.size // block)
        windows, inside = np.divmod(offsets, self.window)
        slots = np.empty_like(offsets)
        for w in np.unique(windows):
            chosen = windows == w
            width = min(self.window, blocks * block - int(w) * self.window)
            slots[chosen] = w * self.window + self._in_window(number, int(w), width, inside[chosen])
        place, rest = np.divmod(slots, block)
        return _permute(place, blocks, np.full(len(place), self._key(number, "blocks"))) * block + rest

    def _in_window(self, number: int, w: int, width: int, inside: Positions) -> Positions:
        stream = self._key(number, f"window {w}")
        if width < self.window:
            return _permute(inside, width, np.full(len(inside), stream))
        # A whole window holds every remainder p % lanes equally often, wherever it begins.
        lane = (number * self.size + w * self.window + inside) % self.lanes
        each = self.window // self.lanes
        return lane * each + _permute(inside // self.lanes, each, _hash(lane.astype(np.uint64), stream))

    def _key(self, number: int, purpose: str) -> np.uint64:
        """Hash (seed, stream, number, purpose) to 64 bits: the key of one permutation."""
        return np.uint64(key(self.seed, number, f"order {self.stream}/{purpose}").integer())


@dataclass(frozen=True)
class MixedOrder:
    """The order of a mixture: which source a position draws from, and which of its samples.

    weights: shares of the positions, > 0, one a source; met exactly over every CYCLE positions of a lane, up to
    rounding to 1 / CYCLE. Every source is walked in its own order, pass by pass. A sample's index is its index in its
    source plus the sizes of the sources before.
    """

    orders: tuple[Order, ...]
    weights: tuple[float, ...]

    @property
    def size(self) -> int:
        """Samples of all sources."""
        return sum(order.size for order in self.orders)

    @property
    def seed(self) -> int:
        """The seed of the run, which all sources share."""
        return self.orders[0].seed

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Positions of a cycle that each source gets, at least one; they sum to CYCLE (largest remainders)."""
        exact = np.array(self.weights) / sum(self.weights) * CYCLE
        counts = np.maximum(1, np.floor(exact).astype(np.int64))
        while counts.sum() < CYCLE:
            counts[np.argmax(exact - counts)] += 1
        while counts.sum() > CYCLE:
            counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
        return tuple(counts.tolist())

    def sample(self, position: int, attempt: int = 0) -> int:
        """Return the index of the sample at `position`; a replacement comes from the same source."""
        source, inner = self._place(position)
        return self._start(source) + self.orders[source].sample(position if attempt else inner, attempt)

    def samples(self, positions: Positions) -> Positions:
        """Return the indices of the samples at `positions` (n,)."""
        places = np.array([self._place(p) for p in positions.tolist()], dtype=np.int64).reshape(-1, 2)
        out = np.empty(len(positions), dtype=np.int64)
        for source in np.unique(places[:, 0]).tolist():
            chosen = places[:, 0] == source
            out[chosen] = self._start(source) + self.orders[source].samples(places[chosen, 1])
        return out

    def _start(self, source: int) -> int:
        return sum(order.size for order in self.orders[:source])

    def _place(self, position: int) -> tuple[int, int]:
        """Return (source, position in that source's order); a lane's positions stay in that lane of the source."""
        turn, lane = divmod(position, LANES)
        cycle, slot = divmod(turn, CYCLE)
        sources, before = _cycle(self.seed, self.counts, cycle, lane)
        source = int(sources[slot])
        return source, (cycle * self.counts[source] + int(before[slot])) * LANES + lane


@functools.lru_cache(maxsize=4 * LANES)
def _cycle(seed: int, counts: tuple[int, ...], cycle: int, lane: int) -> tuple[Positions, Positions]:
    """Return, for every slot of a cycle of one lane, its source and how many slots before it that source had."""
    sources = np.repeat(np.arange(len(counts)), counts)
    sources = sources[key(seed, cycle, f"order/mixture, lane {lane}").generator().permutation(CYCLE)]
    before = np.empty(CYCLE, dtype=np.int64)
    for source, count in enumerate(counts):
        before[sources == source] = np.arange(count)
    return sources, before


def _hash(x: Ints, stream: np.uint64 | Ints) -> Ints:
    """Mix 64-bit integers with a stream key (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = x + stream + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _permute(values: Positions, size: int, streams: Ints) -> Positions:
    """Map each of `values` in [0, size) through the permutation of [0, size) that the stream beside it keys.

    A balanced Feistel network permutes the next power of four; a value that lands outside of [0, size) walks on
    until it is inside, which keeps the map one-to-one.
    """
    if size <= 1 or not len(values):
        return values
    if size <= _RANKED:
        hashes = _hash(np.arange(size, dtype=np.uint64), streams[:, None])
        return (hashes < np.take_along_axis(hashes, values[:, None], 1)).sum(1)
    half = np.uint64((int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    out = values.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right, stream = out[outside] >> half, out[outside] & mask, streams[outside]
        for number in range(_ROUNDS):
            with np.errstate(over="ignore"):
                step = stream + np.uint64(number) * np.uint64(0xD1342543DE82EF95)
            left, right = right, left ^ (_hash(right, step) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)
