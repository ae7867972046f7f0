"""Local copies of what is read remotely, in blocks, bounded in size and shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from altsight.core.errors import UserError

KEPT = 0.9
"""Share of the limit that is left when the least recently used blocks have gone."""
ABANDONED = 3600.0
"""Seconds after which an unfinished block is one of a process that died."""
RECENT = 60.0
"""Seconds that the time of the last use may be behind."""


@dataclass(frozen=True)
class Cache:
    """Blocks in `folder`, at most `limit` bytes of them."""

    folder: Path
    limit: int

    def path(self, name: str, fetch: Callable[[], bytes]) -> Path:
        """Return a local file with the block `name`, which `fetch` yields if it is not there.

        Processes that ask at the same moment fetch it once. It may be removed when others need the room; what is open
        or mapped by then stays readable.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = self._path(name)
        if self._touch(path):
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One lock file for each of 4,096 parts of the folder: few files, and hardly ever waiting for others.
            with FileLock(path.parent / "lock"):
                if not self._touch(path):
                    self._write(path, fetch())
        except OSError as error:
            raise UserError(
                f"the cache in '{self.folder}' cannot be written ({error.strerror}): free some space, choose another "
                "--data.cache, or switch it off with --data.cache-gb 0."
            ) from None
        return path

    def read(self, name: str, at: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Return bytes at .. at + size of the block `name`; see `path`."""
        while True:
            try:
                with self.path(name, fetch).open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), size, at)
            except FileNotFoundError:  # removed between the two
                continue

    def drop(self, name: str) -> None:
        """Forget the block `name`."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", errors="replace")).hexdigest()
        return self.folder / digest[:3] / digest[3:35]

    def _touch(self, path: Path) -> bool:
        """True if the block is there; its time of change says when it was last used."""
        try:
            if time.time() - path.stat().st_mtime > RECENT:
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _write(self, path: Path, data: bytes) -> None:
        self._make_room(len(data))
        part = path.with_suffix(f".part-{os.getpid()}")
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used blocks where `wanted` more bytes would not fit."""
        blocks = []
        for file in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                about = file.stat()
                if file.suffix.startswith(".part") and time.time() - about.st_mtime > ABANDONED:
                    file.unlink()
                elif file.name != "lock":
                    blocks.append((about.st_mtime, about.st_size, file))
        held = sum(size for _, size, _ in blocks)
        if held + wanted <= self.limit:
            return
        for _, size, file in sorted(blocks):
            if held + wanted <= KEPT * self.limit:
                break
            file.unlink(missing_ok=True)
            held -= size


def open_cache(folder: str, gigabytes: float) -> Cache | None:
    """Return the cache in `folder` (the user's own cache folder where it is empty); None for a size of 0."""
    if gigabytes <= 0:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Cache(Path(folder) if folder else home / "altsight" / "blocks", int(gigabytes * 1e9))
