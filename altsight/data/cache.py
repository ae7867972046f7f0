"""Local copies of what is read remotely, in blocks, bounded in size and shared by all processes of a machine.

Beside the blocks the folder holds `*.part`, a block that is being fetched, which is locked meanwhile, and `total`, the
bytes that all of them take. Several runs may share a folder; other files in it are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from altsight.core.errors import UserError

KEPT = 0.9
"""Share of the limit that is left when the least recently used blocks have gone."""
ABANDONED = 3600.0
"""Seconds after which an unfinished block that nobody works on is removed."""
RECENT = 60.0
"""Seconds that the time of the last use may be behind."""


class _NotKeptError(Exception):
    def __init__(self, data: bytes, why: str) -> None:
        self.data, self.why = data, why


@dataclass(frozen=True)
class Cache:
    """Blocks in `folder`, at most `limit` bytes of them.

    A block is named by any text, which must change with its content (address, version and place), and is fetched once
    even if several processes ask for it at the same moment. `fetch` may itself read other blocks.
    """

    folder: Path
    limit: int

    def read(self, name: str, at: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Return bytes at .. at + size of the block `name`, fewer at its end; `fetch` yields it if it is not there.

        Where the folder cannot hold the block, what was fetched is used all the same, with one warning.
        """
        try:
            file, data = self._get(name, fetch)
        except _NotKeptError as error:
            _warn(f"the cache in '{self.folder}' is passed over: {error.why}.")
            file, data = None, error.data
        if file is None:
            return data[at : at + size]
        with file:
            return os.pread(file.fileno(), size, at)

    def path(self, name: str, fetch: Callable[[], bytes]) -> Path:
        """Return a local file with the block `name`, to be opened or mapped soon.

        It may be removed when others need the room; what is open or mapped by then stays readable.

        Raises:
            UserError: the folder cannot hold it.
        """
        try:
            file, _ = self._get(name, fetch)
        except _NotKeptError as error:
            raise UserError(
                f"the cache in '{self.folder}' is needed to read '{name}', but {error.why}: free some space, choose "
                "another --data.cache, or raise --data.cache-gb."
            ) from None
        if file is not None:
            file.close()
        return self._path(name)

    def drop(self, name: str) -> None:
        """Forget the block `name`."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode("utf-8", errors="surrogatepass"), digest_size=20)
        return self.folder / f"{digest.hexdigest()}.block"

    def _get(self, name: str, fetch: Callable[[], bytes]) -> tuple[FileIO | None, bytes]:
        """Return the open block, or its content where it was fetched."""
        path = self._path(name)
        while True:
            try:
                file = FileIO(path)
                _note_use(file)
                return file, b""
            except FileNotFoundError:
                data = self._fetch(path, fetch)
            except OSError as error:
                raise _NotKeptError(fetch(), f"it cannot be read ({error.strerror})") from None
            if data is not None:
                return None, data

    def _fetch(self, path: Path, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch the block and keep it; None where another process has finished or given up meanwhile.

        The part that a block is written to is its lock as well: only who holds that may rename or remove it.
        """
        part = path.with_suffix(".part")
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                claim = stack.enter_context(_locked(part))
            except OSError as error:
                raise _NotKeptError(fetch(), f"it cannot be written ({error.strerror})") from None
            if not _is_at(claim, part):
                return None
            try:
                data = None if path.exists() else fetch()
                if data is not None:
                    self._keep(claim, part, path, data)
            finally:
                if _is_at(claim, part):
                    part.unlink()
        return data

    def _keep(self, claim: FileIO, part: Path, path: Path, data: bytes) -> None:
        if len(data) > self.limit:
            raise _NotKeptError(data, f"a block has {len(data):,} bytes and all may have {self.limit:,}")
        try:
            claim.truncate(len(data))
            self._make_room(len(data))
            with open(claim.fileno(), "wb", closefd=False) as file:
                file.write(data)
            os.fdatasync(claim.fileno())  # or a power cut might leave a whole block of zeros
            with self._ledger():  # so that who looks through the folder finds it under one name
                part.rename(path)
        except OSError as error:
            raise _NotKeptError(data, f"it cannot be written ({error.strerror})") from None

    def _make_room(self, size: int) -> None:
        """Count `size` bytes of a part that is in the folder already; remove old blocks where all are too many.

        Whatever processes die of, the total is never too low, so that the limit holds; when it is passed the folder is
        looked through, which mends it.
        """
        with self._ledger() as ledger:
            known = ledger.read(20)
            total = int(known) + size if known.isdigit() else self.limit + 1
            if total > self.limit:
                total = self._sweep()
            os.pwrite(ledger.fileno(), b"%020d" % total, 0)

    def _ledger(self) -> contextlib.AbstractContextManager[FileIO]:
        return _locked(self.folder / "total")

    def _sweep(self) -> int:
        """Remove the least recently used blocks if there are too many; return the bytes that are left."""
        blocks, total = list[tuple[float, int, str]](), 0
        for entry in os.scandir(self.folder):
            if not entry.name.endswith((".block", ".part")):
                continue
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat()
                if entry.name.endswith(".block"):
                    blocks.append((about.st_mtime, about.st_size, entry.path))
                elif time.time() - about.st_mtime > ABANDONED and _remove_abandoned(Path(entry.path)):
                    continue
                total += about.st_size
        if total > self.limit:
            for _, size, path in sorted(blocks):
                if total <= KEPT * self.limit:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size
        return total


def open_cache(folder: str, gigabytes: float) -> Cache | None:
    """Return the cache in `folder` (the user's own cache folder where it is empty); None for a size of 0."""
    if gigabytes <= 0:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Cache(Path(folder) if folder else home / "altsight" / "blocks", int(gigabytes * 1e9))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """Open a file, which is made if need be, for this thread of this process alone; the system unlocks what dies."""
    with FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing it is not enough where a process was forked meanwhile


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(part: Path) -> bool:
    """Remove a part that nobody has locked; False if somebody has."""
    with FileIO(part) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(file, part):
            part.unlink()
    return True


def _note_use(file: FileIO) -> None:
    if time.time() - os.fstat(file.fileno()).st_mtime > RECENT:
        with contextlib.suppress(OSError):  # a block of another user
            os.utime(file.fileno())


@functools.lru_cache
def _warn(message: str) -> None:
    """Warn once in each process."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
