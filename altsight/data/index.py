"""Shards -> offset index: where every sample's image, text and metadata lie, found once and read by range afterwards.

A sample is a run of tar members with one key (`000000123.jpg`, `000000123.txt`, `000000123.json`), the WebDataset
layout that img2dataset leaves. The index is a structured numpy array, memory-mapped when it comes from a file.
"""

from __future__ import annotations

import functools
import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("image_at", "<u8"),
        ("image_size", "<u4"),
        ("text_at", "<u8"),
        ("text_size", "<u4"),
        ("json_at", "<u8"),
        ("json_size", "<u4"),
    ]
)
"""One sample; a size of 0 means that the part is absent."""


def find_shards(source: str | os.PathLike[str]) -> list[Path]:
    """Return the tar shards that `source` names: a tar file, a folder of tars, or a glob pattern; sorted by path.

    Raises:
        UserError: the path does not exist or holds no tar file.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        where = f"the folder '{text}' holds"
    elif path.is_file():
        shards, where = [path], ""
    elif any(c in text for c in "*?["):
        shards = sorted(p for p in map(Path, glob.glob(text)) if p.is_file())
        where = f"the pattern '{text}' matches"
    else:
        raise UserError(f"'{text}' does not exist: give a tar file, a folder of tar shards, or a quoted glob pattern.")
    if not shards:
        raise UserError(f"{where} no .tar shard: give the folder that img2dataset wrote its 00000.tar ... to.")
    return shards


@dataclass(frozen=True)
class Index:
    """All samples of some shards, in shard order."""

    shards: tuple[Path, ...]
    samples: npt.NDArray[np.void]

    def __len__(self) -> int:
        return len(self.samples)

    def thinned(self, most: int) -> Index:
        """Return the index of every n-th sample, with the smallest n that leaves at most `most`."""
        return Index(self.shards, self.samples[:: max(1, -(-len(self) // most))])

    def image(self, i: int) -> bytes:
        """Return the encoded image of sample `i`."""
        return self._read(i, "image")

    def text(self, i: int) -> bytes:
        """Return the `.txt` part of sample `i` (empty when it has none)."""
        return self._read(i, "text")

    def json(self, i: int) -> bytes:
        """Return the `.json` part of sample `i` (empty when it has none)."""
        return self._read(i, "json")

    def name(self, i: int) -> str:
        """Return 'shard.tar#offset', which finds sample `i` again."""
        row = self.samples[i]
        return f"{self.shards[row['shard']]}#{row['image_at']}"

    def _read(self, i: int, part: str) -> bytes:
        row = self.samples[i]
        size = int(row[f"{part}_size"])
        if not size:
            return b""
        file = _file(str(self.shards[row["shard"]]))
        return os.pread(file.fileno(), size, int(row[f"{part}_at"]))


@functools.lru_cache(maxsize=256)
def _file(path: str) -> FileIO:
    """Open a shard for reading by range; it is closed when it falls out of the cache."""
    try:
        return FileIO(path)
    except OSError as error:
        raise UserError(
            f"the shard '{path}' cannot be opened any more ({error.strerror}): put it back or run `altsight prepare` "
            "again."
        ) from None


def index_shards(shards: Sequence[Path], progress: Callable[[Path], None] = lambda shard: None) -> Index:
    """Read the headers of `shards` and return their index; `progress` is called after each shard.

    Raises:
        UserError: a shard is truncated, not a tar file, or cannot be read.
    """
    parts = [np.empty(0, dtype=SAMPLE)]
    for number, shard in enumerate(shards):
        parts.append(np.array(list(_samples(number, shard)), dtype=SAMPLE))
        progress(shard)
    return Index(tuple(p.resolve() for p in shards), np.concatenate(parts))


def _samples(number: int, shard: Path) -> Iterator[tuple[int, ...]]:
    key, parts = "", dict[str, tuple[int, int]]()
    for name, at, size in _members(shard):
        stem, suffix = _split_name(name)
        if not stem:
            continue
        if stem != key:
            if parts.get("image"):
                yield _row(number, parts)
            key, parts = stem, {}
        if suffix in IMAGE_SUFFIXES:
            parts["image"] = (at, size)
        elif suffix in ("txt", "json"):
            parts["text" if suffix == "txt" else "json"] = (at, size)
    if parts.get("image"):
        yield _row(number, parts)


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of every plain file in the tar `shard`."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would go back and read the same member for ever
                    raise tarfile.ReadError("negative size")
                if member.isfile() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            # A tar ends with a block of zeros; where a cut falls between two members only its absence tells.
            with shard.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end-of-archive block")
    # Damaged numbers in headers make tarfile raise ValueError besides its own errors.
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"the shard '{shard}' is truncated or not a tar file ({error}): download it again or remove it."
        ) from None
    except OSError as error:
        raise UserError(f"the shard '{shard}' cannot be read ({error.strerror}): mend or remove it.") from None


def _split_name(name: str) -> tuple[str, str]:
    """Split 'folder/key.suffix' at the first dot of the file name, as WebDataset does.

    The key is empty for files that belong to no sample: hidden ones ('._000.jpg' of macOS) and ones without a suffix.
    """
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if stem and suffix else ""), suffix.lower()


def _row(number: int, parts: dict[str, tuple[int, int]]) -> tuple[int, ...]:
    absent = (0, 0)
    return (number, *parts["image"], *parts.get("text", absent), *parts.get("json", absent))
