"""Real servers on 127.0.0.1 for tests of remote files: S3, and a web server that misbehaves when it is told to."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import Any
from urllib.parse import unquote, urlsplit

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server in a process of its own; yields its address, for AWS_ENDPOINT_URL."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = {**os.environ, "NO_COLOR": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert process.stderr is not None
    try:
        address = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)))[0]
        # Somebody has to read its log, or the pipe fills up and it stands still.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address
    finally:
        process.kill()
        process.wait()


def s3_client(address: str) -> Any:
    """Return boto3's client of the server at `address`, to fill it with."""
    import boto3

    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client("s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"], **keys)


class WebServer(ThreadingHTTPServer):
    """Serves `files` ("/name" -> bytes) by range, and a page of links for "/folder/".

    Faults: a status ("503"), "stall" (no answer), "slow" (half of the body, then no more), "break" (half of the body,
    then the connection is closed), "short" (fewer bytes than asked for, as if that were all), "whole" (knows no
    ranges), "drop" (the connection is closed at once), "garbage" (no HTTP).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        """(name, range) of every request."""
        self.abandoned = threading.Semaphore(0)
        """Released for every stalled request that the client gave up."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._faults: dict[str, Iterator[str]] = {}

    def fail(self, name: str, *faults: str, always: bool = False) -> str:
        """Let the next requests for `name` (or all of them) fail, one fault each; returns the file's URL."""
        self._faults[name] = repeat(faults[0]) if always else iter(faults)
        return self.url + name

    def forgive(self) -> None:
        """Forget what was asked for, and let nothing fail any more."""
        self.asked.clear()
        self._faults.clear()

    def fault(self, name: str) -> str:
        """Return the fault of this request for `name`, "" for none."""
        return next(self._faults.get(name, iter(())), "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested here."""


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Run a web server in a thread."""
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait for the acknowledgement of the header
    server: WebServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path)
        self.server.asked.append((name, self.headers.get("Range", "")))
        fault = self.server.fault(name)
        if fault == "stall":
            self._stall()
        elif fault == "drop":
            self.close_connection = True
        elif fault == "garbage":
            self.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")
            self.close_connection = True
        elif fault.isdecimal():
            self._answer(int(fault), b"an error page", {})
        elif name.endswith("/"):
            links = "".join(f'<a href="{other[len(name) :]}">' for other in self.server.files if other.startswith(name))
            self._answer(200, links.encode(), {"Content-Type": "text/html"})
        elif name not in self.server.files:
            self._answer(404, b"no such file", {})
        else:
            self._serve(self.server.files[name], fault)

    def _serve(self, data: bytes, fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        about = {"ETag": f'"{hash(data)}"'}
        if not asked or fault == "whole":
            self._answer(200, data, about)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        if fault == "short":
            stop = (start + stop) // 2
        part = data[start:stop]
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, part, about, sent=len(part) // 2 if fault in ("slow", "break") else None)
        if fault == "slow":
            self._stall()

    def _answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """Answer with the first `sent` bytes of `body`, all by default; the header always tells of all."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent is not None

    def _stall(self) -> None:
        """Wait until the client hangs up."""
        self.wfile.flush()
        gone, _, _ = select.select([self.connection], [], [], 10)
        if gone:
            self.server.abandoned.release()
        self.close_connection = True
