"""One request for a part of a remote file through fsspec, tried again.

A request has a timeout, is tried again with growing pauses (`Retry`), and yields exactly the bytes that were asked for.
Credentials and endpoints are those of fsspec's own configuration and of the cloud's tools (AWS_PROFILE,
AWS_ENDPOINT_URL ...); where S3 has no credentials at all, files are asked for anonymously, which public buckets allow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from altsight.core.errors import UserError

CHUNK = 2**23
"""Bytes of a remote file that one request of a stream asks for."""
THREADS = 16
"""Requests under way at once where many files are asked for."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


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


def forget() -> None:
    """Let go of the connections that are held open, and set TRAFFIC to 0."""
    for server in [server for server in _FILESYSTEMS if server[0] == os.getpid()]:
        del _FILESYSTEMS[server]
    gc.collect()  # now, because a process that is forked must not be the one to collect them: see `_FILESYSTEMS`
    TRAFFIC.requests = TRAFFIC.bytes = TRAFFIC.retries = 0


def ask(path: str, verb: str, patience: int = 1, **options: Any) -> Any:
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
            return _call(filesystem(path), verb, path, timeout, options)
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # every filesystem has errors of its own
            if type(error).__name__ == "NoCredentialsError" and _without_credentials(path):
                return ask(path, verb, patience, **options)
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
        asked = "asked anonymously, as there are no credentials: " if getattr(filesystem(path), "anon", False) else ""
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


def filesystem(path: str) -> Any:
    """Return fsspec's filesystem for the server of `path`, connected once in each process."""
    server = _server(path)
    if server not in _FILESYSTEMS:
        _FILESYSTEMS.setdefault(server, _connect(path))
    return _FILESYSTEMS[server]


def _without_credentials(path: str) -> bool:
    """Ask the server of `path` anonymously from now on; False if it was done before."""
    if filesystem(path).anon:
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
        # Attempts are counted in `ask` alone, and a pool of ten connections would hold THREADS back.
        fs.retries = 1
        fs.config_kwargs = {"retries": {"max_attempts": 0}, "max_pool_connections": 2 * THREADS, **fs.config_kwargs}
    return fs
