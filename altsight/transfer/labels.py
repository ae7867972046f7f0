"""Labelled images for training: classes from folder names or a field, one of them for each image or several."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any

from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import Key
from altsight.core.types import Document, Image
from altsight.data.cache import Cache
from altsight.data.captions import as_text, look_up
from altsight.data.order import MixedOrder, Order
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.sources import Pairs


@dataclass(frozen=True)
class Labels:
    """How the classes of a sample are written.

    field: where they stand. several: an image may have any number of them, as a list or as a text that `separator`
    divides; otherwise it has one.
    """

    field: str
    several: bool = False
    separator: str = ","

    def of(self, fields: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes that `fields` holds; () where there are none."""
        value = look_up(fields, self.field)
        if not self.several:
            return (as_text(value),) if as_text(value) else ()
        found = value if isinstance(value, list) else as_text(value).split(self.separator)
        names = (as_text(name).strip() for name in found)
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class LabelledImages:
    """A source of images with their classes; see `altsight.data.sources.Source`.

    Documents hold the ids of the image's classes in `meta["classes"]`.

    source: what the user calls it. partners: draw a second image by the same key for an augmentation that mixes two; it
    comes after the first, its ids in `meta["partner"]`.
    """

    source: str
    pairs: Pairs
    labels: Labels
    classes: tuple[str, ...]
    partners: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def is_remote(self) -> bool:
        """True where a document may take long to read."""
        return self.pairs.is_remote

    def document(self, i: int, at: Key) -> Document:
        """Return image `i`, and its partner where partners are drawn; BrokenSample where one cannot be read."""
        meta = {"classes": self.ids(i)}
        parts: tuple[Image, ...] = (Image(self.pairs.image(i)),)
        if self.partners:
            # By image, so that one that cannot be read is not the partner of all that replace it.
            other = int(at.child(f"partner of {i}").generator().integers(len(self)))
            meta["partner"] = self.ids(other)
            parts += (Image(self.pairs.image(other)),)
        return Document(parts, self.name(i), meta)

    def ids(self, i: int) -> tuple[int, ...]:
        """Return the ids of the classes of image `i`."""
        return tuple(self.class_ids[name] for name in self.labels.of(self.pairs.fields(i)))

    @functools.cached_property
    def class_ids(self) -> dict[str, int]:
        """Class name -> its id."""
        return {name: number for number, name in enumerate(self.classes)}

    def name(self, i: int) -> str:
        """Return where image `i` lies."""
        return self.pairs.name(i)

    def order(self, seed: int) -> Order | MixedOrder:
        """Return the order of a run under `seed`."""
        return self.pairs.order(seed)

    def texts(self, i: int) -> list[str]:
        """Labels are no text to learn from."""
        return []

    def parts(self) -> dict[str, int]:
        """Return the number of images in every shard."""
        return self.pairs.parts()

    def cached(self, cache: Cache | None) -> LabelledImages:
        """Return the source with its remote blocks kept in `cache`."""
        return replace(self, pairs=self.pairs.cached(cache))

    def digest(self) -> str:
        """Return 12 hex digits that name the images and their classes."""
        index = self.pairs.index
        digest = hashlib.sha256(repr((self.labels, self.classes, index.every)).encode())
        digest.update(index.rows.tobytes())
        return digest.hexdigest()[:12]


def open_labelled(source: str, labels: Labels, known: tuple[str, ...] = ()) -> LabelledImages:
    """Return the images at `source`, a path or "samples:NAME/SPLIT", with the classes `known`, or those that occur.

    Raises:
        UserError: the source cannot be read, has lists where an image has one class, has fewer than two classes, or
            one that is not `known`.
    """
    pairs = read_pairs(locate(source), (), "" if labels.several else labels.field)
    first = look_up(pairs.fields(0), labels.field) if len(pairs) else None
    if not labels.several and isinstance(first, list) and len(first) > 1:
        raise UserError(
            f"the field '{labels.field}' of '{source}' holds lists: name one with a single class, or fine-tune with "
            "--multi-label."
        )
    found = _several(pairs, labels) if labels.several else pairs.classes
    if not found:
        raise UserError(f"no image of '{source}' has a class in the field '{labels.field}': name another --label.")
    if not known and len(found) < 2:
        raise UserError(f"'{source}' has a single class, '{found[0]}': a classifier needs two or more.")
    for name in found:
        if known and name not in known:
            near = did_you_mean(name, known)
            raise UserError(f"'{source}' has the class '{name}', which the training images do not have.{near}")
    return LabelledImages(source, pairs, labels, known or found)


def _several(pairs: Pairs, labels: Labels) -> tuple[str, ...]:
    return tuple(sorted({name for i in range(len(pairs)) for name in labels.of(pairs.fields(i))}))
