"""Files on local disk or behind a URL (s3://, gs://, https:// ...), read by range through fsspec.

A remote request has a timeout, is tried again with growing pauses (`Retry`), and yields exactly the bytes that were
asked for. Credentials and endpoints are those of fsspec's own configuration and of the cloud's tools (AWS_PROFILE,
AWS_ENDPOINT_URL ...); where S3 has no credentials at all, files are asked for anonymously, which public buckets allow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import glob
import io
import itertools
import os
import random
import re
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from typing import Any, BinaryIO, TypeVar

from altsight.core.errors import UserError

CHUNK = 2**23
"""Bytes of a remote file that one request of a stream asks for."""
THREADS = 16
"""Requests under way at once where many files are asked for."""
MOST_NAMES = 1_000_000
"""Names that braces may stand for; more are a slip of the pen."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Retry:
    """How patient remote reads are; waits and timeout in seconds, the timeout for every CHUNK of one attempt."""

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 20.0
    timeout: float = 30.0


def retry() -> Retry:
    """Return the defaults, or what ALTSIGHT_READ_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT and _TIMEOUT say instead.

    The environment reaches worker processes however they are started.

    Raises:
        UserError: one of them is no number.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Retry):
        name, default = f"ALTSIGHT_READ_{field.name.upper()}", getattr(Retry, field.name)
        try:
            values[field.name] = type(default)(os.environ.get(name, default))
        except ValueError:
            raise UserError(f"{name}={os.environ[name]} is no number: set it to one, or unset it.") from None
    return Retry(**values)


@dataclass
class Traffic:
    """What this process has read remotely: requests (retries among them), and bytes that were asked for and came."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0


TRAFFIC = Traffic()


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
    for server in [server for server in _FILESYSTEMS if server[0] == os.getpid()]:
        del _FILESYSTEMS[server]
    gc.collect()  # now, because a process that is forked must not be the one to collect them: see `_FILESYSTEMS`
    TRAFFIC.requests = TRAFFIC.bytes = TRAFFIC.retries = 0


def expand(source: str, suffixes: Collection[str]) -> list[str]:
    """Return the files that `source` names: a file, a folder, a glob pattern, braces, or several joined by "::".

    suffixes: those wanted, without a dot. A folder yields the files in it, not those in its subfolders, sorted, and so
    does a pattern, hidden files left out; braces ("{0000..0099}", "{a,b}") yield theirs in the order in which a shell writes them.

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


def braces(pattern: str) -> Iterator[str]:
    """Yield what bash makes of the braces in `pattern`: "{a,b}", "{00..12}", "{a..e}", "{0..100..10}", nested.

    Braces without a counterpart, a comma or a range are plain characters.
    """
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    before, (words, end) = pattern[:start], _words(pattern, start)
    for word in words:
        for middle in braces(word) if end > start + 1 else [word]:
            for rest in braces(pattern[end:]):
                yield before + middle + rest


def _words(pattern: str, start: int) -> tuple[Iterable[str], int]:
    """Return what the brace at `start` stands for, and where its counterpart ends: itself if it is a plain one."""
    depth, cuts = 0, [start]
    for at in range(start, len(pattern)):
        depth += (pattern[at] == "{") - (pattern[at] == "}")
        if depth == 1 and pattern[at] == ",":
            cuts.append(at)
        elif depth == 0:
            if len(cuts) > 1:
                return [pattern[a + 1 : b] for a, b in itertools.pairwise([*cuts, at])], at + 1
            counted = _count(pattern[start + 1 : at])
            return (["{"], start + 1) if counted is None else (counted, at + 1)
    return ["{"], start + 1


def _count(words: str) -> Iterable[str] | None:
    """Return the words of "first..last" or "first..last..step", numbers or letters; None for anything else."""
    found = re.fullmatch(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?", words, re.ASCII)
    if found is None or found[1].isalpha() != found[2].isalpha():
        return None
    letters = found[1].isalpha()
    first, last = (ord(found[1]), ord(found[2])) if letters else (int(found[1]), int(found[2]))
    step = (abs(int(found[3] or 1)) or 1) * (1 if first <= last else -1)
    numbers = range(first, last + (1 if step > 0 else -1), step)
    padded = any(re.match(r"-?0\d", word) for word in found.group(1, 2))
    width = max(len(found[1]), len(found[2])) if padded else 0
    return (chr(n) if letters else str(n).zfill(width) for n in numbers)


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
    fs = _filesystem(word)
    fs.invalidate_cache()
    found = _present(word, lambda: _ask(word, "glob" if magic else "ls", patience=20, detail=True))
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
        data: bytes = _ask(path, "cat_file", patience=-(-size // CHUNK), start=at, end=at + size)
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
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._path)
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), CHUNK, self._size - self._at))
        buffer[:count] = read(self._path, self._at, count)
        self._at += count
        return count

    def readall(self) -> bytes:
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
    about: dict[str, Any] = _ask(path, "info")
    if about.get("type") == "directory":
        raise FileNotFoundError(path)
    if about.get("size") is None:
        raise UserError(f"the server of '{path}' does not tell its size: copy the file to a disk and give that one.")
    versions = (about.get(name) for name in ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "created"))
    return Stamp(int(about["size"]), str(next(filter(None, versions), "")))


# From here on: one remote request, tried again.


def _ask(path: str, verb: str, patience: int = 1, **options: Any) -> Any:
    """Return what the filesystem of `path` answers to `verb`; `patience` is the factor of the timeout.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it may not be read, or all attempts have failed.
    """
    policy = retry()
    timeout, wait, reason = policy.timeout * patience, policy.first_wait, ""
    for attempt in range(policy.attempts):
        if attempt:
            TRAFFIC.retries += 1
            # Many workers that were refused at once must not come back at once; no sample depends on this.
            time.sleep(min(wait, policy.longest_wait) * random.SystemRandom().uniform(0.5, 1))
            wait *= 2
        TRAFFIC.requests += 1
        try:
            return _call(_filesystem(path), verb, path, timeout, options)
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # every filesystem has errors of its own
            if type(error).__name__ == "NoCredentialsError" and _without_credentials(path):
                return _ask(path, verb, patience, **options)
            reason = _reason(path, error, timeout)
    raise UserError(
        f"'{path}' could not be read in {policy.attempts} attempts (at last: {reason}): look after the network or the "
        "server, and run again."
    )


def _call(fs: Any, verb: str, path: str, timeout: float, options: dict[str, Any]) -> Any:
    """Ask once; a request to an asynchronous filesystem is cancelled when `timeout` seconds are over."""
    from fsspec.asyn import sync

    if not fs.async_impl:
        answer = getattr(fs, verb)(path, **options)
    else:
        over_http = _HTTP.get(verb) if path.startswith("http") else None
        method = functools.partial(over_http, fs) if over_http else getattr(fs, f"_{verb}")
        answer = sync(fs.loop, method, path, timeout=timeout, **options)
    if verb == "cat_file":
        wanted = options["end"] - options["start"]
        if len(answer) > wanted:
            raise _no_ranges(path)
        if len(answer) < wanted:
            raise EOFError(f"{len(answer):,} of {wanted:,} bytes came")
    return answer


def _no_ranges(path: str) -> UserError:
    return UserError(f"the server of '{path}' yields whole files only, no parts: copy them to a disk and give those.")


async def _http_range(fs: Any, url: str, start: int, end: int) -> bytes:
    async with _http(fs, url, start, end) as answer:
        answer.raise_for_status()
        # Told by the header: fsspec would take in a whole shard from a server that knows no ranges.
        if answer.status == 200 and (start, answer.content_length) != (0, end - start):
            raise _no_ranges(url)
        data: bytes = await answer.read()
        return data


async def _http_info(fs: Any, url: str) -> dict[str, Any]:
    """Ask for the first byte: signed addresses and some servers refuse HEAD, which fsspec would use."""
    async with _http(fs, url, 0, 1) as answer:
        about = {name: answer.headers.get(name) for name in ("ETag", "Last-Modified")}
        if answer.status == 416:  # an empty file has no first byte
            return {"size": 0, **about}
        answer.raise_for_status()
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status == 200:
            size = answer.headers.get("Content-Length", "")
        return {"size": int(size) if size.isdecimal() else None, **about}


@contextlib.asynccontextmanager
async def _http(fs: Any, url: str, start: int, end: int) -> AsyncIterator[Any]:
    """Ask for bytes start .. end as they are, not compressed on the way."""
    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        yield answer


_HTTP: dict[str, Callable[..., Any]] = {"cat_file": _http_range, "info": _http_info}


def _reason(path: str, error: Exception, timeout: float) -> str:
    """Return in plain words why an attempt failed.

    Raises:
        UserError: another attempt cannot help.
    """
    status = _status(error)
    said = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    words = f"{status or ''} {str(said).splitlines()[0]}".strip()
    if isinstance(error, PermissionError) or status in (401, 403) or words.startswith("Forbidden"):  # gcsfs
        asked = "asked anonymously, as there are no credentials: " if getattr(_filesystem(path), "anon", False) else ""
        raise UserError(
            f"'{path}' may not be read ({asked}{words}): set up credentials that may, or check its name."
        ) from None
    if status == 416:
        raise UserError(f"the shard '{path}' is shorter than its index says: run `altsight prepare` again.") from None
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    return words


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs, or botocore, which s3fs makes others of."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(status) if status.isdecimal() else None


_FILESYSTEMS: dict[tuple[int, str], Any] = {}
"""By process and server. A process that was forked must neither use its parent's, whose thread it does not have, nor
let go of them: that would close the parent's connections in the event loop that both share."""


def _server(path: str) -> tuple[int, str]:
    return os.getpid(), "/".join(path.split("/", 3)[:3])


def _filesystem(path: str) -> Any:
    server = _server(path)
    if server not in _FILESYSTEMS:
        _FILESYSTEMS.setdefault(server, _connect(path))
    return _FILESYSTEMS[server]


def _without_credentials(path: str) -> bool:
    """Ask the server of `path` anonymously from now on; False if it was done before."""
    if _filesystem(path).anon:
        return False
    _FILESYSTEMS[_server(path)] = _connect(path, anon=True)
    return True


def _connect(path: str, **options: Any) -> Any:
    scheme = path.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        fs = url_to_fs(path, skip_instance_cache=True, **options)[0]
    except ImportError as error:
        package = PACKAGES.get(scheme)
        hint = f"needs {package}: pip install 'altsight[remote]'" if package else f"needs a package: {error}"
        raise UserError(f"'{path}' {hint}.") from None
    except ValueError as error:
        raise UserError(f"'{path}' cannot be opened ({error}): check the address.") from None
    if scheme in ("s3", "s3a"):
        # Attempts are counted in `_ask` alone, and a pool of ten connections would hold THREADS back.
        fs.retries = 1
        fs.config_kwargs = {"retries": {"max_attempts": 0}, "max_pool_connections": 2 * THREADS, **fs.config_kwargs}
    return fs
