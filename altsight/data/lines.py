"""Tables as text: CSV, TSV and JSON lines; a sample is a row, found again by its bytes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from altsight.core.errors import UserError
from altsight.data.record import BrokenSample

DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST = 2**24
"""Bytes of the longest row that is taken for one; a file without line ends is no table."""

csv.field_size_limit(min(sys.maxsize, LONGEST))


def scan_lines(path: str, kind: str, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of every row of a CSV, TSV (after its header) or JSON lines file.

    Raises:
        UserError: it has no header row, or a row without an end; `path` names it in the message.
    """
    at = 0
    if kind == "jsonl":
        for line in _raw_lines(path, stream):
            if line.strip():
                yield at, line
            at += len(line)
        return
    lines = _Counted(_raw_lines(path, stream))
    rows = csv.reader(lines, delimiter=DELIMITERS[kind])
    try:
        for number, row in enumerate(rows):
            if number and row:
                yield at, b"".join(lines.taken)
            at += sum(map(len, lines.taken))
            lines.taken.clear()
    except csv.Error as error:
        raise UserError(f"the table '{path}' is damaged after byte {at:,} ({error}): mend that row.") from None


def read_header(path: str, kind: str, stream: BinaryIO) -> tuple[str, ...]:
    """Return the column names of a CSV or TSV file; () for JSON lines, whose rows name their own fields.

    Raises:
        UserError: the first row is no header.
    """
    if kind == "jsonl":
        return ()
    try:
        first = next(csv.reader(_Counted(_raw_lines(path, stream)), delimiter=DELIMITERS[kind]), [])
    except csv.Error:
        first = [""]
    names = tuple(name.strip().removeprefix("\ufeff") for name in first)
    if not names or not all(names) or len(set(names)) < len(names):
        raise UserError(f"the first row of '{path}' is no header with one name for each column: write one.")
    return names


def parse_line(data: bytes, kind: str, header: Sequence[str]) -> dict[str, Any]:
    """Return the fields of one row.

    Raises:
        BrokenSample: it is no row of this table.
    """
    text = _text(data)
    if kind == "jsonl":
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenSample(f"no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise BrokenSample("no JSON object")
        return fields
    try:
        row = next(csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[kind]), [])
    except csv.Error as error:
        raise BrokenSample(str(error)) from None
    if len(row) != len(header):
        raise BrokenSample(f"{len(row)} fields where the header names {len(header)}")
    return dict(zip(header, row, strict=True))


class _Counted:
    """Lines as text for the CSV reader, which takes several for a row with quoted line ends; their bytes are kept."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.taken: list[bytes] = []

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.taken.append(line)
        return _text(line)


def _text(data: bytes) -> str:
    """Decode a row; a carriage return within it would end it for the CSV reader, so it is a space."""
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", " ")


def _raw_lines(path: str, stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise UserError(f"'{path}' has a row of more than {LONGEST:,} bytes, so it is no table: remove it.")
        yield line
