"""Counter-based randomness: every random number is a pure function of (seed, position, purpose).

No generator state travels through a run, so the numbers do not depend on the number of workers, ranks or restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Key:
    """A point in the space of randomness; the same key always yields the same numbers."""

    seed: int
    position: int
    purpose: str = ""

    def child(self, purpose: str) -> Key:
        """Return the key of a named sub-purpose, independent of its parent and siblings."""
        return Key(self.seed, self.position, f"{self.purpose}/{purpose}")

    def integer(self) -> int:
        """Return 63 uniform bits, as a seed for generators outside of our control (torch)."""
        return int.from_bytes(self._digest()[:8], "little") >> 1

    def generator(self) -> np.random.Generator:
        """Return a fresh numpy generator (Philox) at this key."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self._digest(), "little")))

    def _digest(self) -> bytes:
        text = f"{self.seed}|{self.position}|{self.purpose}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


def key(seed: int, position: int, purpose: str = "") -> Key:
    """Return the key of `purpose` at sample `position` of the run with this `seed`."""
    return Key(seed, position, purpose)


@contextmanager
def torch_seeded(at: Key) -> Iterator[None]:
    """Run the body with torch's global generators (CPU and the current accelerator) set from `at`.

    The CPU state is put back afterwards. Used where a library draws from the global state (initialisation, dropout).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(at.integer())
        yield
