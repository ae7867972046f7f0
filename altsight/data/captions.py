"""Captions: templates over the fields of a sample, and the one way in which fields become text."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from altsight.core.errors import UserError

LONGEST_TEXT = 10_000
"""Characters of a text after which the rest is left aside; web pages slip into alt texts."""
MOST_CAPTIONS = 64
"""Captions of one sample after which the rest is left aside."""


@dataclass(frozen=True)
class Captions:
    """How the captions of a pair are made: one or more templates over `txt` and the fields of the JSON part.

    "{txt}" is the text, "{title}" a field, "{captions.en}" a field of a field, "{title}, {tags}" joins fields (lists
    are joined by commas). "{captions[]}" yields a caption for every entry of a list or line of a text, as "{txt}" does
    where the text is a list. A template whose fields are not all there yields no caption. Training draws one of the
    captions that a sample has, by key; retrieval counts all of them.

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
            each = sum(piece[1].endswith("[]") for piece in pieces if piece[1])
            if not pieces or each > 1 or any(not name or spec or conversion for _, name, spec, conversion in pieces):
                raise UserError(
                    f"the caption template '{template}' is malformed: name one or more fields in braces, as in "
                    "'{title}, {tags}'."
                )

    @property
    def fields(self) -> frozenset[str]:
        """Names used by the templates."""
        parsed = (piece for template in self.templates for piece in string.Formatter().parse(template))
        return frozenset(name.removesuffix("[]") for _, name, _, _ in parsed if name)

    def __call__(self, values: Mapping[str, Any]) -> list[str]:
        """Return the distinct captions that `values` yields, in the order of the templates."""
        captions = (caption for template in self.templates for caption in _fill(template, values))
        return list(dict.fromkeys(caption for caption in captions if caption))


def _fill(template: str, values: Mapping[str, Any]) -> list[str]:
    """Return `template` with its fields filled in; [] if one of them is absent."""
    captions = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        captions = [caption + literal for caption in captions]
        if name:
            words = _words(values, name)
            captions = [caption + word for caption in captions for word in words]
    return [caption.strip() for caption in captions]


def _words(values: Mapping[str, Any], name: str) -> list[str]:
    """Return what stands for a field of a template; several where each of its entries makes a caption."""
    value = look_up(values, name.removesuffix("[]"))
    if name.endswith("[]") and isinstance(value, str):
        value = value.splitlines()
    each = isinstance(value, list) and (name.endswith("[]") or name == "txt")
    return [word for word in map(as_text, value if each else [value]) if word][:MOST_CAPTIONS]


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
    text = str(value)[:LONGEST_TEXT].replace("\0", "").encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(text.split())
