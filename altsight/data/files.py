"""Files on local disk or behind a URL (s3://, gs://, https:// ...): what a pattern names, what a file is, its bytes."""

from __future__ import annotations

import errno
import functools
import glob
import io
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from typing import Any, BinaryIO, TypeVar

from altsight.core.errors import UserError
from altsight.data import remote
from altsight.data.braces import braces
from altsight.data.remote import CHUNK, THREADS, TRAFFIC

MOST_NAMES = 1_000_000
"""Names that braces may stand for; more are a slip of the pen."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file is: its bytes, and an entity tag or time of change ("" where the server tells none)."""

    size: int
    version: str


def is_remote(path: str) -> bool:
    """True for a URL of another scheme than file."""
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme != "file"


def parent(path: str) -> str:
    """Return the folder that a file lies in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def suffix(path: str) -> str:
    """Return the letters after the last dot of a file's name, in lower case; of a web page's, without its query."""
    name = path.partition("?")[0] if path.startswith(("http://", "https://")) else path
    _, dot, letters = name.rpartition("/")[2].rpartition(".")
    return letters.lower() if dot else ""


def forget() -> None:
    """Let go of files and connections that are held open, and set TRAFFIC to 0.

    For files that were replaced under their name, and for credentials or endpoints that have changed.
    """
    _file.cache_clear()
    remote.forget()


def expand(source: str, suffixes: Collection[str]) -> list[str]:
    """Return the files that `source` names: a file, a folder, a glob pattern, braces, or several joined by "::".

    suffixes: those wanted, without a dot. A folder yields the files in it, not those in its subfolders; it and a
    pattern leave hidden files out and yield the others sorted. Braces ("{0000..0099}", "{a,b}") yield theirs in the
    order in which a shell writes them.

    Raises:
        UserError: nothing is there, a file that is named is missing, has another suffix, or is named twice.
    """
    paths: list[str] = []
    for pattern in source.split("::"):
        # A local name that is there is taken as it is, whatever it looks like.
        there = not is_remote(pattern) and os.path.exists(_plain(pattern))
        words = [pattern] if there else list(itertools.islice(braces(pattern), MOST_NAMES + 1))
        if len(words) > MOST_NAMES:
            raise UserError(f"the braces in '{pattern}' stand for more than {MOST_NAMES:,} names: mend them.")
        for word in words:
            paths += (_remote if is_remote(word) else _local)(word, suffixes)
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"'{source}' names '{twice}' twice: name each file once.")
    stamps([path for path in paths if is_remote(path)])
    return paths


def _local(word: str, suffixes: Collection[str]) -> list[str]:
    word = _plain(word)
    if os.path.isdir(word):
        found = [os.path.join(word, name) for name in os.listdir(word) if not name.startswith(".")]
    elif os.path.exists(word):
        found = [word]
    elif glob.has_magic(word):
        found = glob.glob(word, recursive=True)
    else:
        raise UserError(f"'{word}' does not exist: give a file, a folder of shards, or a quoted pattern.")
    return _wanted(word, (path for path in found if os.path.isfile(path)), suffixes)


def _remote(word: str, suffixes: Collection[str]) -> list[str]:
    # Addresses of web pages have a "?" that is no pattern.
    magic = re.search(r"[*[]" if word.startswith("http") else r"[*?[]", word)
    if not magic and suffix(word) in suffixes:
        return [word]
    fs = remote.filesystem(word)
    fs.invalidate_cache()
    found = _present(word, lambda: remote.ask(word, "glob" if magic else "ls", patience=20, detail=True))
    entries = found.values() if isinstance(found, dict) else found
    # Filesystems name files without what stands before the bucket or the path.
    root = word.rstrip("/").removesuffix(fs._strip_protocol(word).rstrip("/"))
    names = (entry["name"] for entry in entries if entry["type"] == "file")
    return _wanted(word, (root + name for name in names if "/." not in name), suffixes)


def _wanted(word: str, found: Iterable[str], suffixes: Collection[str]) -> list[str]:
    wanted = sorted(path for path in found if suffix(path) in suffixes)
    if not wanted:
        raise UserError(f"'{word}' holds no .{', .'.join(suffixes)} file: give the file, folder or pattern that does.")
    return wanted


def stamp(path: str) -> Stamp:
    """Return what the file at `path` is now, or was when `expand` listed its folder.

    Raises:
        UserError: it is not there, may not be read, or its server does not tell its size.
    """
    if is_remote(path):
        return _present(path, lambda: _remote_stamp(path))
    try:
        found = os.stat(_plain(path))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path.") from None
    return Stamp(found.st_size, str(found.st_mtime_ns))


def stamps(paths: Sequence[str]) -> list[Stamp]:
    """Return the `stamp` of many files, asked for at once."""
    return _at_once(stamp, paths, THREADS)


def read(path: str, at: int, size: int) -> bytes:
    """Return bytes at .. at + size of a file; fewer where a local file ends before.

    Raises:
        UserError: the file is gone, ends before (remote), or its server does not yield it after all attempts.
    """
    if not is_remote(path):
        return _pread(path, at, size)
    if size == 0:
        return b""
    try:
        data: bytes = remote.ask(path, "cat_file", patience=-(-size // CHUNK), start=at, end=at + size)
    except FileNotFoundError:
        raise UserError(f"the shard '{path}' is gone: put it back or run `altsight prepare` again.") from None
    TRAFFIC.bytes += size
    return data


def read_many(requests: Sequence[tuple[str, int, int]], threads: int = THREADS) -> list[bytes]:
    """Return the bytes of several (path, at, size), in order, read at once by `threads` threads; see `read`."""
    return _at_once(lambda request: read(*request), requests, threads)


def read_whole(path: str, most: int) -> bytes | None:
    """Return a whole file; None where it is not there, has more than `most` bytes, or is no plain file.

    Raises:
        UserError: it is remote, and may not be read or its server does not answer.
    """
    try:
        if is_remote(path):
            size = _remote_stamp(path).size
            return read(path, 0, size) if size <= most else None
        about = os.stat(_plain(path))
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            return None
        with open(_plain(path), "rb") as file:
            return file.read()
    except OSError:
        return None


def open_stream(path: str) -> BinaryIO:
    """Open a file for reading from end to end, seekable.

    Raises:
        UserError: it is not there, or cannot be read; reading raises it as `read` does.
    """
    if is_remote(path):
        return io.BufferedReader(_Stream(path, stamp(path).size), CHUNK)
    try:
        return open(_plain(path), "rb")
    except OSError as error:
        raise UserError(f"the shard '{path}' cannot be read ({error.strerror}): mend or remove it.") from None


class _Stream(io.RawIOBase):
    """A remote file as a raw stream of requests."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is asked for before it is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._path)
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with at most CHUNK bytes."""
        count = max(0, min(len(buffer), CHUNK, self._size - self._at))
        buffer[:count] = read(self._path, self._at, count)
        self._at += count
        return count

    def readall(self) -> bytes:
        """Return the rest, in chunks that are asked for at once."""
        starts = range(self._at, self._size, CHUNK)
        self._at = max(self._at, self._size)
        return b"".join(read_many([(self._path, at, min(CHUNK, self._size - at)) for at in starts]))


def _plain(path: str) -> str:
    return path.removeprefix("file://")


def _pread(path: str, at: int, size: int) -> bytes:
    try:
        file = _file(_plain(path))
        # The offset is the call's own, so processes that were forked may share the descriptor.
        return os.pread(file.fileno(), size, at)
    except OSError as error:
        raise UserError(
            f"the shard '{path}' cannot be read any more ({error.strerror}): put it back or run `altsight prepare` "
            "again."
        ) from None


@functools.lru_cache(maxsize=256)
def _file(path: str) -> FileIO:
    """Open a file for reading by range; it is closed when it falls out of the cache and nobody reads it."""
    return FileIO(path)


def _at_once(function: Callable[[T], U], items: Sequence[T], threads: int) -> list[U]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _present(path: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: check the address.") from None


def _remote_stamp(path: str) -> Stamp:
    about: dict[str, Any] = remote.ask(path, "info")
    if about.get("type") == "directory":
        raise FileNotFoundError(path)
    if about.get("size") is None:
        raise UserError(f"the server of '{path}' does not tell its size: copy the file to a disk and give that one.")
    versions = (about.get(name) for name in ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "created"))
    return Stamp(int(about["size"]), str(next(filter(None, versions), "")))
