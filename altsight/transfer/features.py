"""Frozen features as a source: a probe that is trained on them reads no image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altsight.core.rng import Key
from altsight.core.types import Document
from altsight.data.cache import Cache
from altsight.data.order import Order


@dataclass(frozen=True)
class Features:
    """Feature vectors (n, D) with the ids of the classes of each; see `altsight.data.sources.Source`.

    Documents have no parts; `meta` holds `features` (D,) and `classes`. names: where each image lies.
    """

    vectors: Tensor
    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def is_remote(self) -> bool:
        """False: all lies in memory."""
        return False

    def document(self, i: int, at: Key) -> Document:
        """Return vector `i`; nothing is left to be drawn by `at`."""
        return Document((), self.names[i], {"features": self.vectors[i], "classes": self.ids[i]})

    def name(self, i: int) -> str:
        """Return where image `i` lies."""
        return self.names[i]

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Features have no text."""
        return []

    def parts(self) -> dict[str, int]:
        """Return the number of vectors in the one part that there is."""
        return {"features": len(self)}

    def cached(self, cache: Cache | None) -> Features:
        """Return itself: nothing is remote."""
        return self
