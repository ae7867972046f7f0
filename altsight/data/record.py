"""One sample as its shard holds it: named fields, and an image or the place where one lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from altsight.data.decode import BrokenImage

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"})
IMAGE_FIELDS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "image_file", "file_name", "filename"),
    *("filepath", "file_path", "path", "file"),
)
"""What the columns of tables of images are called, in order of preference."""
TEXT_FIELDS = ("txt", "text", "caption", "captions", "alt_text", "alt", "title")
"""What the columns of captions are called, in order of preference; the first one found is also the field `txt`."""


class BrokenSample(BrokenImage):
    """The sample cannot be read as it was indexed; the loader replaces it and counts it."""


@dataclass(frozen=True, slots=True)
class Record:
    """A sample. image: its encoded bytes, the path or name to look it up by, or None where it has none."""

    fields: dict[str, Any]
    image: bytes | str | None = None


def table_record(fields: dict[str, Any], image_field: str = "") -> Record:
    """Return the record of one row of a table; columns are found by their usual names, whatever their case.

    An image is bytes, a path, or the struct of bytes and path that Hugging Face data sets keep.
    """
    names = {name.casefold(): name for name in reversed(fields)}
    field = image_field or next((names[name] for name in IMAGE_FIELDS if name in names), "")
    image = _image(fields.get(field))
    rest = {name: value for name, value in fields.items() if name != field or isinstance(image, str)}
    text = next((names[name] for name in TEXT_FIELDS if name in names), "")
    if text and "txt" not in rest:
        rest["txt"] = fields[text]
    return Record(rest, image)


def _image(value: Any) -> bytes | str | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes | str) and value else None


def checksum(value: Any) -> int:
    """Return 32 bits over bytes, or over a row of a table with all that is nested in it."""
    if isinstance(value, bytes):
        return xxhash.xxh3_64_intdigest(value) & 0xFFFFFFFF
    digest = xxhash.xxh3_64()
    _update(digest, value)
    return digest.intdigest() & 0xFFFFFFFF


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(repr(name).encode())
            _update(digest, value[name])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        digest.update(f"{len(value)} values".encode())
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())
