"""Sources: a data set on disk -> `Document`, by index."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from altsight.core.rng import Key
from altsight.core.types import Document, Image, Text
from altsight.data.cache import Cache
from altsight.data.captions import Captions, as_text, look_up
from altsight.data.documents import Interleaved, Placed, Sampling, pair, read_document, sample
from altsight.data.images import Images
from altsight.data.index import Index
from altsight.data.order import MixedOrder, Order
from altsight.data.record import BrokenSample, Record


class Source(Protocol):
    """Documents by index, 0 to len - 1."""

    def __len__(self) -> int: ...

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read, so that many should be read at once."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels in `meta`."""
        ...

    def document(self, i: int, at: Key) -> Document:
        """Return document `i`; what there is to draw (a caption, images, their places) is drawn by `at`.

        Raises:
            BrokenSample: it is of no use.
            UserError: its shard is gone.
        """
        ...

    def name(self, i: int) -> str:
        """Return where document `i` lies: its shard and its place there."""
        ...

    def order(self, seed: int) -> Order | MixedOrder:
        """Return the order in which a run under `seed` sees the documents."""
        ...

    def texts(self, i: int) -> list[str]:
        """Return every text that document `i` may show; a tokenizer is trained on them."""
        ...

    def parts(self) -> dict[str, int]:
        """Return the number of documents in every shard, by the shard's name."""
        ...

    def cached(self, cache: Cache | None) -> Source:
        """Return the source with its remote blocks kept in `cache`."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Image-text pairs, with an optional label from a field. images: where images lie that the shards only name."""

    index: Index
    captions: Captions = field(default_factory=Captions)
    label: str = ""
    classes: tuple[str, ...] = ()
    images: Images | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read."""
        return self.index.is_remote or (self.images is not None and self.images.is_remote)

    def document(self, i: int, at: Key) -> Document:
        """Return pair `i`: its image and one of its captions, drawn by `at`; meta holds `label` (int) if there is one.

        A sample without a caption yields the image alone.
        """
        record = self.index.record(i)
        captions = self.captions(record.fields)
        parts: tuple[Text | Image, ...] = (Image(self._image(record)),)
        if captions:
            choice = at.child("caption").generator().integers(len(captions)) if len(captions) > 1 else 0
            parts += (Text(captions[int(choice)]),)
        name = self.class_name(record.fields)
        meta = {"label": self.label_ids[name]} if name in self.label_ids else {}
        return Document(parts, self.name(i), meta)

    @functools.cached_property
    def label_ids(self) -> dict[str, int]:
        """Class name -> its number."""
        return {name: number for number, name in enumerate(self.classes)}

    def name(self, i: int) -> str:
        """Return where pair `i` lies."""
        return self.index.name(i)

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def parts(self) -> dict[str, int]:
        """Return the number of pairs in every shard."""
        return self.index.parts()

    def cached(self, cache: Cache | None) -> Pairs:
        """Return the source with its remote blocks kept in `cache`."""
        return replace(self, index=self.index.cached(cache), images=self.images and self.images.cached(cache))

    def thinned(self, most: int) -> Pairs:
        """Return every n-th pair, with the smallest n that leaves at most `most`."""
        return replace(self, index=self.index.thinned(most))

    def image(self, i: int) -> bytes:
        """Return the encoded image of pair `i`; BrokenSample where it cannot be read."""
        return self._image(self.index.record(i))

    def all_captions(self, i: int) -> list[str]:
        """Return every caption of pair `i`; none where it cannot be read."""
        return self.captions(self.fields(i))

    texts = all_captions

    def fields(self, i: int) -> dict[str, Any]:
        """Return the fields of pair `i`, which captions and labels are made from; {} where it cannot be read."""
        try:
            return self.index.record(i).fields
        except BrokenSample:
            return {}

    def class_name(self, fields: Mapping[str, Any]) -> str:
        """Return the class that `fields` name in the label field; empty where there is none."""
        return as_text(look_up(fields, self.label)) if self.label else ""

    def _image(self, record: Record) -> bytes:
        if isinstance(record.image, bytes):
            return record.image
        return find_image((record.image,) if record.image else (), self.images)


def find_image(names: tuple[str, ...], images: Images | None) -> bytes:
    """Return the image that goes by one of `names`; BrokenSample where there is none, or nowhere to look for it."""
    if images is None or not names:
        raise BrokenSample("it has no image")
    return images.get(names)


@dataclass(frozen=True)
class Interleaves:
    """Interleaved documents (MMC4, OBELICS), drawn as LCL draws them.

    as_pairs: one image with its sentence instead of the whole document, for methods that learn from pairs.
    """

    index: Index
    images: Images | None = None
    sampling: Sampling = field(default_factory=Sampling)
    as_pairs: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read."""
        return self.index.is_remote or (self.images is not None and self.images.is_remote)

    @property
    def classes(self) -> tuple[str, ...]:
        """Documents have no labels."""
        return ()

    def document(self, i: int, at: Key) -> Document:
        """Return document `i`: texts and images in reading order, or one image and its sentence.

        Images that cannot be found are left out, and meta says why (`missing`); BrokenSample where none is left.
        """
        document = self.interleaved(i)
        drawn: list[str | Placed] = []
        if self.as_pairs:
            chosen = pair(document, self.sampling, at)
            drawn = [] if chosen is None else [chosen[1], chosen[0]]
        else:
            drawn = sample(document, self.sampling, at)
        parts, missing = list[Text | Image](), list[str]()
        for part in drawn:
            try:
                parts.append(self._part(part))
            except BrokenSample as error:
                missing.append(str(error))
        if not any(isinstance(part, Image) for part in parts):
            raise BrokenSample(missing[0] if missing else "no image of it is similar enough to its text")
        return Document(tuple(parts), self.name(i), {"missing": missing} if missing else {})

    def interleaved(self, i: int) -> Interleaved:
        """Return all of document `i`; BrokenSample where it cannot be read."""
        document = read_document(self.index.record(i).fields)
        if document is None:
            raise BrokenSample("it is no document in the layout of MMC4 or OBELICS")
        return document

    def name(self, i: int) -> str:
        """Return where document `i` lies."""
        return self.index.name(i)

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Return the texts of document `i`."""
        try:
            return [text for text in map(as_text, self.interleaved(i).texts) if text]
        except BrokenSample:
            return []

    def parts(self) -> dict[str, int]:
        """Return the number of documents in every shard."""
        return self.index.parts()

    def cached(self, cache: Cache | None) -> Interleaves:
        """Return the source with its remote blocks kept in `cache`."""
        return replace(self, index=self.index.cached(cache), images=self.images and self.images.cached(cache))

    def _part(self, part: str | Placed) -> Text | Image:
        return Text(as_text(part)) if isinstance(part, str) else Image(part.data or find_image(part.names, self.images))
