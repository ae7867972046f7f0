"""Images that are not in the record that names them: loose files in a folder, or samples of other shards."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from altsight.data import files
from altsight.data.cache import Cache
from altsight.data.index import Index
from altsight.data.record import BrokenSample

NAME = np.dtype([("name", "<u8"), ("sample", "<u8")])
"""An image of a store: hash of a name that it goes by, and its sample."""
LARGEST = 2**28
"""Bytes of the largest file that is taken for an image."""


class Images(Protocol):
    """Where images are looked up by name."""

    def get(self, names: Sequence[str]) -> bytes:
        """Return the encoded image that goes by the first of `names` that is known; BrokenSample where none is."""
        ...

    @property
    def is_remote(self) -> bool:
        """True where a look-up may take long."""
        ...

    def cached(self, cache: Cache | None) -> Images:
        """Return the same with remote blocks kept in `cache`."""
        ...


@dataclass(frozen=True)
class Folder:
    """Loose files below `root`, local or remote; names are paths relative to it."""

    root: str

    @property
    def is_remote(self) -> bool:
        """True where a look-up may take long."""
        return files.is_remote(self.root)

    def cached(self, cache: Cache | None) -> Folder:
        """Loose files are not kept: as many small ones would wear the cache out."""
        return self

    def get(self, names: Sequence[str]) -> bytes:
        """Return the file of the first name that is there; BrokenSample where none is, or it lies outside of `root`."""
        for name in names:
            path = inside(self.root, name)
            if path is not None and (data := files.read_whole(path, LARGEST)) is not None:
                return data
        raise BrokenSample(f"there is no image '{names[0]}' in '{self.root}'" if names else "no image")


@dataclass(frozen=True)
class Stored:
    """Samples of tar or Parquet shards, by file name, key, or the URL that their metadata names.

    names: NAME rows, sorted by name; mapped from `file` where it is given.
    """

    index: Index
    names: npt.NDArray[np.void]
    file: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Stored, (self.index, self.names)) if self.file is None else (open_stored, (self.index, self.file))

    @property
    def is_remote(self) -> bool:
        """True where a look-up may take long."""
        return self.index.is_remote

    def cached(self, cache: Cache | None) -> Stored:
        """Return the same with remote blocks kept in `cache`."""
        return replace(self, index=self.index.cached(cache))

    def get(self, names: Sequence[str]) -> bytes:
        """Return the image of the first name that is known; BrokenSample where none is."""
        for name in names:
            wanted = name_hash(name)
            place = int(np.searchsorted(self.names["name"], wanted))
            if place < len(self.names) and self.names[place]["name"] == wanted:
                image = self.index.record(int(self.names[place]["sample"])).image
                if isinstance(image, bytes):
                    return image
        raise BrokenSample(f"there is no image '{names[0]}' in the image shards" if names else "no image")


def open_stored(index: Index, file: Path) -> Stored:
    """Open the store whose sorted names lie in `file`."""
    return Stored(index, np.load(file, mmap_mode="r"), file)


def name_hash(name: str) -> np.uint64:
    """Return 64 bits that stand for a name."""
    return np.uint64(xxhash.xxh3_64_intdigest(name.encode("utf-8", errors="replace")))


def inside(root: str, name: str) -> str | None:
    """Return the path of `name` below `root`; None where it leads out of it."""
    if "\0" in name:
        return None
    if files.is_remote(root):
        path = posixpath.normpath(posixpath.join("/", name))[1:]
        return f"{root.rstrip('/')}/{path}" if path and ".." not in name.split("/") else None
    base = os.path.abspath(root)
    whole = os.path.normpath(os.path.join(base, name))
    return whole if whole != base and whole.startswith(base.rstrip(os.sep) + os.sep) else None
