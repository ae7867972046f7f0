"""WebDataset tar shards: a sample is a run of members with one key (`0001.jpg`, `0001.txt`, `0001.json`).

That is what img2dataset leaves, and the LAION, CC3M, CC12M and DataComp downloads made with it. A sample is read with
one ranged read over the whole run of its members; their headers are parsed again then.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from altsight.core.errors import UserError
from altsight.data.record import IMAGE_SUFFIXES, Record

BLOCK = tarfile.BLOCKSIZE
LONGEST_TEXT = 2**20
"""Bytes of a text after which the rest is left aside; another member that is as long is no text."""


def scan_tar(path: str, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of every sample with an image in the tar `stream`; `path` is its name in messages.

    Raises:
        UserError: it is truncated, compressed, or no tar file.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            key, start, has_image = "", 0, False
            for member in tar:
                if member.size < 0:  # tarfile would go back and read the same member for ever
                    raise tarfile.ReadError("negative size")
                stem, suffix = split_name(member.name)
                if not stem:
                    continue
                if stem != key:
                    if has_image:
                        yield _span(stream, start, member.offset)
                    key, start, has_image = stem, member.offset, False
                has_image |= suffix in IMAGE_SUFFIXES and member.isfile() and not member.issparse()
            # A tar ends with a block of zeros; where a cut falls between two members only its absence tells.
            stream.seek(tar.offset)
            if stream.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("no end-of-archive block")
            if has_image:
                yield _span(stream, start, tar.offset)
    # Damaged numbers in headers make tarfile raise ValueError besides its own errors.
    except (tarfile.TarError, ValueError, EOFError) as error:
        head = _head(stream)
        why = "it is compressed: unpack it first" if head[:2] in (b"\x1f\x8b", b"BZ", b"(\xb5") else str(error)
        raise UserError(
            f"the shard '{path}' is truncated or not a tar file ({why}): download it again or remove it."
        ) from None


def parse_tar(data: bytes) -> Record:
    """Return the record in a run of tar members: its first image, `txt`, `cls`, and the fields of its JSON part.

    The name of every other text member (`KEY.caption`, `KEY.en.txt`) is a field too. Damage yields what can be read.
    """
    fields: dict[str, Any] = {}
    image: bytes | None = None
    for name, start, size in _members(data):
        suffix = split_name(name)[1]
        part = data[start : start + size]
        if suffix in IMAGE_SUFFIXES:
            image = image or part
        elif suffix == "json":
            fields |= _json(part)
        elif suffix == "txt" or (size <= LONGEST_TEXT and b"\0" not in part):
            text = part[:LONGEST_TEXT].decode("utf-8-sig", errors="replace")
            fields[suffix.removesuffix(".txt")] = int(text) if suffix == "cls" and text.strip().isdecimal() else text
    return Record(fields, image)


def members_in(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (file name without folders, bytes) of every image among the members of one sample."""
    for name, start, size in _members(data):
        if split_name(name)[1] in IMAGE_SUFFIXES:
            yield name.rpartition("/")[2], data[start : start + size]


def split_name(name: str) -> tuple[str, str]:
    """Split 'folder/key.suffix' at the first dot of the file name, as WebDataset does.

    The key is empty for files that belong to no sample: hidden ones ('._000.jpg' of macOS) and ones without a suffix.
    """
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if stem and suffix else ""), suffix.lower()


def _span(stream: BinaryIO, start: int, stop: int) -> tuple[int, bytes]:
    back = stream.tell()
    stream.seek(start)
    data = stream.read(stop - start)
    stream.seek(back)
    return start, data


def _head(stream: BinaryIO) -> bytes:
    try:
        stream.seek(0)
        return stream.read(4)
    except (OSError, ValueError):
        return b""


def _members(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, size) of the plain files in a run of members whose headers were found sound before."""
    at, long_name = 0, ""
    while at + BLOCK <= len(data):
        header, start = data[at : at + BLOCK], at + BLOCK
        size, kind = _number(header[124:136]), header[156:157]
        if size < 0:
            return
        if kind in (b"L", b"x"):  # GNU and POSIX headers that hold the name of the next member
            long_name = _long_name(kind, data[start : start + size]) or long_name
        elif kind != b"g":
            if kind in (b"0", b"\0", b"7"):
                yield long_name or _name(header), start, size
            long_name = ""
        at = start + -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """Return a header's number: octal digits, or big-endian after a set first bit (GNU); -1 where it is neither."""
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    prefix = header[345:500].partition(b"\0")[0] if header[257:262] == b"ustar" and header[262:263] == b"\0" else b""
    name = header[:100].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", errors="replace")


def _long_name(kind: bytes, data: bytes) -> str:
    if kind == b"L":
        return data.partition(b"\0")[0].decode("utf-8", errors="replace")
    _, found, rest = (b" " + data).partition(b" path=")
    return rest.partition(b"\n")[0].decode("utf-8", errors="replace") if found else ""


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
