"""Images with captions to learn from: every caption is a sample, and a share of all captions may be left."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Document, Image, Text
from altsight.data.cache import Cache
from altsight.data.order import MixedOrder, Order
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.sources import Pairs


@dataclass(frozen=True)
class CaptionedImages:
    """A source with one document for each chosen caption; see `altsight.data.sources.Source`.

    chosen: (n, 2) sample in `pairs`, and which of its captions.
    """

    pairs: Pairs
    chosen: npt.NDArray[np.int64] = field(compare=False)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read."""
        return self.pairs.is_remote

    @property
    def classes(self) -> tuple[str, ...]:
        """Captions are no labels."""
        return ()

    def document(self, i: int, at: Key) -> Document:
        """Return an image and its caption; BrokenSample where they cannot be read."""
        image, _ = self.chosen[i]
        return Document((Image(self.pairs.image(int(image))), Text(self.caption(i))), self.name(i))

    def caption(self, i: int) -> str:
        """Return caption `i`."""
        image, caption = self.chosen[i].tolist()
        return self.pairs.all_captions(image)[caption]

    def name(self, i: int) -> str:
        """Return where caption `i` lies."""
        return self.pairs.name(int(self.chosen[i, 0]))

    def order(self, seed: int) -> Order | MixedOrder:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Return the one caption."""
        return [self.caption(i)]

    def parts(self) -> dict[str, int]:
        """Return the number of samples in every shard, whether they are chosen or not."""
        return self.pairs.parts()

    def cached(self, cache: Cache | None) -> CaptionedImages:
        """Return the source with its remote blocks kept in `cache`."""
        return replace(self, pairs=self.pairs.cached(cache))

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits that name the images, the chosen captions and their order."""
        digest = hashlib.sha256(repr((self.pairs.captions, self.pairs.index.every)).encode())
        digest.update(self.pairs.index.rows.tobytes() + self.chosen.tobytes())
        return digest.hexdigest()[:12]

    def all_texts(self) -> Iterator[str]:
        """Yield the chosen captions."""
        return (self.caption(i) for i in range(len(self)))


def open_captioned(source: str, templates: tuple[str, ...], fraction: float, seed: int) -> CaptionedImages:
    """Return a share of the captions at `source`, a path or "samples:NAME/SPLIT", and their images.

    The share is taken of the captions, not of the images, as in VisualGPT (specification 8.2): an image may keep one of
    its five. The order and so the choice depend on `seed`.

    Raises:
        UserError: the source cannot be read, has no captions, or the share leaves none.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"a share of {fraction:g} of the captions is none: set --fraction within (0, 1].")
    pairs = read_pairs(locate(source), templates)
    counts = [len(pairs.all_captions(i)) for i in range(len(pairs))]
    every = np.array([(image, n) for image, count in enumerate(counts) for n in range(count)], dtype=np.int64)
    if not len(every):
        raise UserError(
            f"'{source}' has no captions (looked for {', '.join(templates)}): name the fields that hold them, as in "
            "--captions '{title}'."
        )
    left = round(fraction * len(every))
    if not left:
        raise UserError(f"a share of {fraction:g} of {len(every):,} captions leaves none: raise --fraction.")
    order = key(seed, 0, "caption fraction").generator().permutation(len(every))
    return CaptionedImages(pairs, every[np.sort(order[:left])])
