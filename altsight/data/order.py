"""Position -> sample: a pure function of (seed, position), with no state and no epoch to count.

Every pass over the data is a fresh permutation. It is drawn in two steps so that neighbouring positions still read
from few places: blocks of neighbouring samples are permuted among each other, then all samples of a window of
consecutive permuted blocks are permuted inside it. Both permutations are keyed Feistel networks, evaluated in O(1)
for a single position; nothing of the size of the data set is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altsight.core.rng import key

Ints = npt.NDArray[np.uint64]
_ROUNDS = 4


@dataclass(frozen=True)
class Order:
    """The order of a data set of `size` samples under `seed`.

    block: how many neighbouring samples move together before they are mixed in the window.
    window: how many samples are mixed; a multiple of `block`. Data sets that fit in one window are fully shuffled.
    """

    size: int
    seed: int
    block: int = 256
    window: int = 256 * 256

    def sample(self, position: int, attempt: int = 0) -> int:
        """Return the index of the sample at `position`; `attempt` > 0 asks for a replacement of an unusable one."""
        if attempt:
            at = _hash(np.array([position], dtype=np.uint64), _stream(self.seed, attempt, "replacement"))
            return int(at[0] % np.uint64(self.size))
        return int(self.samples(np.array([position]))[0])

    def samples(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the indices of the samples at `positions` (n,)."""
        out = np.empty(len(positions), dtype=np.int64)
        passes, offsets = np.divmod(positions, self.size)
        for number in np.unique(passes):
            chosen = passes == number
            out[chosen] = self._in_pass(int(number), offsets[chosen])
        return out

    def _in_pass(self, number: int, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        windows, inside = np.divmod(offsets, self.window)
        slots = np.empty_like(offsets)
        for w in np.unique(windows):
            chosen = windows == w
            start = int(w) * self.window
            width = min(self.window, self.size - start)
            stream = _stream(self.seed, number, f"window {w}")
            slots[chosen] = start + _permute(inside[chosen], width, stream)
        # The samples left over after the last full block keep their place at the end; the rotation below moves the
        # cut from pass to pass, so that no sample is favoured.
        blocks = self.size // self.block
        place, rest = np.divmod(slots, self.block)
        full = place < blocks
        place[full] = _permute(place[full], blocks, _stream(self.seed, number, "blocks"))
        rotation = int(_stream(self.seed, number, "rotation") % np.uint64(self.size))
        return (place * self.block + rest + rotation) % self.size


def _stream(seed: int, number: int, purpose: str) -> np.uint64:
    """Hash (seed, number, purpose) to 64 bits: the key of one permutation."""
    return np.uint64(key(seed, number, f"order/{purpose}").integer())


def _hash(x: Ints, stream: np.uint64) -> Ints:
    """Mix 64-bit integers with a stream key (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = x + stream + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _permute(values: npt.NDArray[np.int64], size: int, stream: np.uint64) -> npt.NDArray[np.int64]:
    """Map `values` in [0, size) through a keyed permutation of [0, size).

    A balanced Feistel network permutes the next power of four; a value that lands outside of [0, size) walks on
    until it is inside, which keeps the map one-to-one.
    """
    if size <= 1 or not len(values):
        return values
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = values.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for number in range(_ROUNDS):
            with np.errstate(over="ignore"):
                step = stream + np.uint64(number) * np.uint64(0xD1342543DE82EF95)
            left, right = right, left ^ (_hash(right, step) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)
