"""Several sources in one run, by weight; the mixture is part of the pure order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from altsight.core.rng import Key
from altsight.core.types import Document
from altsight.data.cache import Cache
from altsight.data.order import MixedOrder, Order
from altsight.data.sources import Source


@dataclass(frozen=True)
class Mixture:
    """Sources with the share of a run's samples that comes from each; document i counts through them in turn.

    weights: > 0, of any scale. classes: of all sources, sorted.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read."""
        return any(source.is_remote for source in self.sources)

    def document(self, i: int, at: Key) -> Document:
        """Return document `i`; a label is renumbered to its place among all classes."""
        source, inner = self.locate(i)
        document = source.document(inner, at)
        if "label" not in document.meta:
            return document
        label = self.classes.index(source.classes[document.meta["label"]])
        return dataclasses.replace(document, meta=document.meta | {"label": label})

    def name(self, i: int) -> str:
        """Return where document `i` lies."""
        source, inner = self.locate(i)
        return source.name(inner)

    def texts(self, i: int) -> list[str]:
        """Return every text that document `i` may show."""
        source, inner = self.locate(i)
        return source.texts(inner)

    def order(self, seed: int) -> MixedOrder:
        """Return the order of a run under `seed`."""
        orders = tuple(Order(len(source), seed, stream=number) for number, source in enumerate(self.sources))
        return MixedOrder(orders, self.weights)

    def parts(self) -> dict[str, int]:
        """Return the number of documents in every source, by the place of the source and of its first shard."""
        return {f"{number + 1}: {next(iter(s.parts()))}": len(s) for number, s in enumerate(self.sources)}

    def cached(self, cache: Cache | None) -> Mixture:
        """Return the mixture with the remote blocks of its sources kept in `cache`."""
        return dataclasses.replace(self, sources=tuple(source.cached(cache) for source in self.sources))

    def locate(self, i: int) -> tuple[Source, int]:
        """Return the source that document `i` of the mixture lies in, and its index there."""
        for source in self.sources:
            if i < len(source):
                return source, i
            i -= len(source)
        raise IndexError(i)
