"""Sources: a data set on disk -> `Document`, by index."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document, Image, Text
from altsight.data.index import Index


@dataclass(frozen=True)
class Captions:
    """How the captions of a pair are made: one or more templates over `txt` and the fields of the JSON part.

    "{txt}" is the text part, "{title}" a field, "{captions.en}" a field of a field, "{title}, {tags}" joins fields
    (lists are joined by commas). A template whose fields are not all there yields no caption. Training draws one of
    the captions that a sample has, by key; retrieval counts all of them.

    Raises:
        UserError: a template is malformed or names no field.
    """

    templates: tuple[str, ...] = ("{txt}",)

    def __post_init__(self) -> None:
        for template in self.templates:
            try:
                pieces = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
            except ValueError:
                pieces = []
            if not pieces or any(not name or spec or conversion for _, name, spec, conversion in pieces):
                raise UserError(
                    f"the caption template '{template}' is malformed: name one or more fields in braces, as in "
                    "'{title}, {tags}'."
                )

    @property
    def fields(self) -> frozenset[str]:
        """Names used by the templates."""
        return frozenset(name for t in self.templates for _, name, _, _ in string.Formatter().parse(t) if name)

    def __call__(self, values: Mapping[str, Any]) -> list[str]:
        """Return the distinct captions that `values` yields, in the order of the templates."""
        captions = (_fill(template, values) for template in self.templates)
        return list(dict.fromkeys(caption for caption in captions if caption))


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """Return `template` with its fields filled in; empty if one of them is absent."""
    caption = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        caption += literal
        if name:
            words = as_text(look_up(values, name))
            if not words:
                return ""
            caption += words
    return caption.strip()


def look_up(values: Mapping[str, Any], name: str) -> Any:
    """Return the field `name` of `values`, where dots lead into nested fields; None where it is absent."""
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def as_text(value: Any) -> str:
    """Return a JSON value as one line of valid Unicode; empty for null and nested objects."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    if value is None or isinstance(value, Mapping):
        return ""
    # JSON may escape half of a surrogate pair, which no tokenizer and no file takes.
    text = str(value).replace("\0", "").encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(text.split())


@dataclass(frozen=True)
class Pairs:
    """Image-text pairs in WebDataset tars, with an optional label from a JSON field."""

    index: Index
    captions: Captions = field(default_factory=Captions)
    label: str = ""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def document(self, i: int, at: Key) -> Document:
        """Return pair `i`: its image and one of its captions, drawn by `at`; meta holds `label` (int) if there is one.

        A sample without a caption yields the image alone.
        """
        values = self.values(i)
        captions = self.captions(values)
        parts: tuple[Text | Image, ...] = (Image(self.index.image(i)),)
        if captions:
            choice = at.child("caption").generator().integers(len(captions)) if len(captions) > 1 else 0
            parts += (Text(captions[int(choice)]),)
        name = self.class_name(values)
        meta = {"label": self.classes.index(name)} if name in self.classes else {}
        return Document(parts, self.index.name(i), meta)

    def all_captions(self, i: int) -> list[str]:
        """Return every caption of pair `i`."""
        return self.captions(self.values(i))

    def class_name(self, values: Mapping[str, Any]) -> str:
        """Return the class that `values` names in the label field; empty where there is none."""
        return as_text(look_up(values, self.label)) if self.label else ""

    def values(self, i: int) -> dict[str, Any]:
        """Return the fields that captions and labels are made from: `txt` and, where needed, the JSON part."""
        values: dict[str, Any] = {}
        if self.label or self.captions.fields - {"txt"}:
            values = self.fields(i)
        if "txt" in self.captions.fields:
            values["txt"] = self.index.text(i).decode("utf-8", errors="replace")
        return values

    def fields(self, i: int) -> dict[str, Any]:
        """Return the JSON part of pair `i` ({} where it has none or is broken)."""
        try:
            values = json.loads(self.index.json(i) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


def require_text(captions: int, images: int, where: str, fields: Iterable[str] = ()) -> None:
    """Raise UserError if none of the `images` samples of the data set at `where` has a caption.

    `fields` are the JSON fields that its samples do have; the message names them.
    """
    if images and not captions:
        known = ", ".join(sorted(fields))
        raise UserError(
            f"none of the {images:,} images in '{where}' has a caption: give --captions templates over the fields "
            f"that its samples have ({known or 'no JSON field found'}), for example '{{title}}', or --images-only."
        )
