"""One pass over a shard: where its samples lie, their checksums, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from altsight.core.errors import UserError
from altsight.data import files
from altsight.data.captions import Captions, as_text, look_up
from altsight.data.columns import scan_columns
from altsight.data.documents import read_document
from altsight.data.images import NAME, name_hash
from altsight.data.index import ROW, Rows, Shard
from altsight.data.lines import parse_line, scan_lines
from altsight.data.record import BrokenSample, Record, checksum, table_record
from altsight.data.tar import members_in, parse_tar, scan_tar

CHUNK = 65_536
"""Rows that are held in memory before they are handed over."""
MOST_CLASSES = 65_536
LOOKED_UP_BY = ("url", "raw_url", "image_name", "file_name", "key", "path")
"""Fields of image shards that documents may name an image by."""


@dataclass(frozen=True)
class Reading:
    """What a pass looks for. documents: interleaved ones, not pairs. named: the names that images are looked up by."""

    captions: Captions = field(default_factory=Captions)
    label: str = ""
    documents: bool = False
    named: bool = False


@dataclass
class Scanned:
    """A shard and what a pass over it found; `shard.samples` counts the samples that can be indexed."""

    shard: Shard
    captioned: int = 0
    """Samples with a text."""
    captions: int = 0
    left_out: int = 0
    """Records without an image, or that cannot be read."""
    classes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    """Fields of the first sample."""
    digest: str = ""
    """12 hex digits over its rows, which hold checksums of its content."""


Keep = Callable[[Rows], object]


def scan_shard(shard: Shard, reading: Reading, keep: Keep, keep_names: Keep = lambda names: None) -> Scanned:
    """Read `shard` from end to end; hand the rows of its samples to `keep` in chunks, and their names.

    Raises:
        UserError: the shard is damaged, or the label field holds something else than classes.
    """
    found, rows, names = Scanned(shard), list[tuple[int, int, int]](), list[tuple[int, int]]()
    classes, digest, samples = set[str](), hashlib.sha256(), 0
    for at, size, check, record, known in _records(shard, reading.named):
        if record is None or not _usable(record, reading, found, classes):
            found.left_out += 1
            continue
        if not samples:
            found.fields = tuple(sorted(record.fields))
        names += [(int(name_hash(name)), samples) for name in known]
        rows.append((at, size, check))
        samples += 1
        if len(rows) == CHUNK:
            digest.update(_hand_over(rows, names, keep, keep_names))
    digest.update(_hand_over(rows, names, keep, keep_names))
    found.shard = replace(shard, samples=samples)
    found.classes, found.digest = tuple(sorted(classes)), digest.hexdigest()[:12]
    return found


def first_record(shard: Shard) -> Record | None:
    """Return the first record of `shard` that can be read; None where there is none."""
    return next((record for _, _, _, record, _ in _records(shard, named=False) if record is not None), None)


def _hand_over(rows: list[tuple[int, int, int]], names: list[tuple[int, int]], keep: Keep, keep_names: Keep) -> bytes:
    chunk = np.array(rows, ROW)
    keep(chunk)
    keep_names(np.array(names, NAME))
    rows.clear()
    names.clear()
    return chunk.tobytes()


def _records(shard: Shard, named: bool) -> Iterator[tuple[int, int, int, Record | None, list[str]]]:
    """Yield (at, size, checksum, record, names to look its image up by); None for a record that cannot be read."""
    if shard.kind in ("parquet", "arrow"):
        for at, fields in scan_columns(shard.path, shard.kind):
            record = table_record(fields, shard.image_field)
            size = min(len(record.image) if isinstance(record.image, bytes) else 0, 2**32 - 1)
            yield at, size, checksum(fields), record, _names(record, b"") if named else []
        return
    with files.open_stream(shard.path) as stream:
        is_tar = shard.kind == "tar"
        scan = scan_tar(shard.path, stream) if is_tar else scan_lines(shard.path, shard.kind, stream)
        for at, data in scan:
            parsed = _parse(shard, data) if len(data) < 2**32 else None
            names = _names(parsed, data if is_tar else b"") if named and parsed else []
            yield at, len(data), checksum(data), parsed, names


def _parse(shard: Shard, data: bytes) -> Record | None:
    try:
        if shard.kind == "tar":
            return parse_tar(data)
        return table_record(parse_line(data, shard.kind, shard.header), shard.image_field)
    except BrokenSample:
        return None


def _names(record: Record, members: bytes) -> list[str]:
    found = [str(record.fields[name]) for name in LOOKED_UP_BY if record.fields.get(name)]
    return list(dict.fromkeys([*(name for name, _ in members_in(members)), *found]))


def _usable(record: Record, reading: Reading, found: Scanned, classes: set[str]) -> bool:
    """True if the record is a sample; its texts and its class are counted then."""
    if reading.documents:
        document = read_document(record.fields)
        if document is None or not document.images:
            return False
        texts = [text for text in document.texts if text]
    else:
        if record.image is None:
            return False
        texts = reading.captions(record.fields)
    found.captions += len(texts)
    found.captioned += bool(texts)
    if reading.label and (name := as_text(look_up(record.fields, reading.label))):
        classes.add(name)
        if len(classes) > MOST_CLASSES:
            raise UserError(
                f"the field '{reading.label}' of '{found.shard.path}' has more than {MOST_CLASSES:,} values, so it is "
                "no label: give --label a field with classes."
            )
    return True
