"""Files on disk, on a real S3 server, and on a web server that stalls, breaks off, refuses and lies."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altsight.core.errors import UserError
from altsight.data import files
from altsight.data.braces import braces
from tests.data.servers import KEYS, WebServer, s3_client, s3_server, web_server

DATA = bytes(range(256)) * 40
ODD = "odd/a b+c%20é=[1]#?.tar"
TARS = [f"s3://shards/set/{i:02d}.tar" for i in range(3)]


@pytest.fixture(autouse=True)
def no_traffic() -> None:
    files.TRAFFIC.requests = files.TRAFFIC.bytes = files.TRAFFIC.retries = 0


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="shards")
        client.create_bucket(Bucket="public")
        for key in [path.removeprefix("s3://shards/") for path in TARS] + [
            "set/readme.txt",
            "set/._00.tar",
            "set/sub/9.tar",
            ODD,
        ]:
            client.put_object(Bucket="shards", Key=key, Body=DATA)
        client.put_object(Bucket="public", Key="0.tar", Body=DATA, ACL="public-read")
        yield address
    files.forget()


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket 'shards' behind s3://, and one that may be read by anybody."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_address, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def web_module() -> Iterator[WebServer]:
    with web_server() as server:
        yield server
    files.forget()


@pytest.fixture
def web(web_module: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """A web server with three files, and three attempts at each."""
    web_module.files = {f"/set/{i}.tar": DATA for i in range(3)}
    web_module.forgive()
    for name, value in {"ATTEMPTS": 3, "FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.02, "TIMEOUT": 5}.items():
        monkeypatch.setenv(f"ALTSIGHT_READ_{name}", str(value))
    return web_module


# Names.


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("plain", ["plain"]),
        ("", [""]),
        ("{00..03}.tar", ["00.tar", "01.tar", "02.tar", "03.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{1..010}", [f"{i:03d}" for i in range(1, 11)]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{10..0..-5}", ["10", "5", "0"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("x{,y}", ["x", "xy"]),
        ("x{a{0..1},b}y", ["xa0y", "xa1y", "xby"]),
        ("{a}{b", ["{a}{b"]),
        ("{a{1,2}}", ["{a1}", "{a2}"]),
        ("{{1,2}", ["{1", "{2"]),
        ("{a,b}}", ["a}", "b}"]),
        ("{a,{b,c}", ["{a,b", "{a,c"]),
        ("{1..b}{}", ["{1..b}{}"]),
        ("{1..3,5}", ["1..3", "5"]),
    ],
)
def test_braces(pattern: str, words: list[str]) -> None:
    assert list(braces(pattern)) == words
    if pattern and (bash := shutil.which("bash")):
        shell = subprocess.run([bash, "-c", f'printf "%s\\n" {pattern}'], capture_output=True, text=True, check=True)
        assert shell.stdout.splitlines() == words


# (text, what it stands for), built up together.
LETTERS = st.text("abz./", min_size=1, max_size=3).map(lambda text: (text, [text]))
Pattern = tuple[str, list[str]]


def _range(first: int, span: int, width: int, backwards: bool) -> Pattern:
    numbers = list(range(first, first + span + 1))[:: -1 if backwards else 1]
    ends = [str(n).zfill(width) for n in (numbers[0], numbers[-1])]
    padded = any(len(end) > len(str(int(end))) for end in ends)
    return "{" + "..".join(ends) + "}", [str(n).zfill(max(map(len, ends)) if padded else 0) for n in numbers]


RANGES = st.builds(_range, st.integers(0, 120), st.integers(0, 4), st.integers(0, 4), st.booleans())


def _joined(parts: list[Pattern]) -> Pattern:
    words = [""]
    for _, expanded in parts:
        words = [word + more for word in words for more in expanded]
    return "".join(text for text, _ in parts), words


def _listed(parts: list[Pattern]) -> Pattern:
    return "{" + ",".join(text for text, _ in parts) + "}", [word for _, words in parts for word in words]


PATTERNS = st.recursive(
    LETTERS | RANGES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2).map(_joined) | st.lists(inner, min_size=2, max_size=3).map(_listed)
    ),
    max_leaves=4,
)


@given(PATTERNS)
@settings(max_examples=200, deadline=None)
def test_braces_stand_for_what_they_were_built_from(pattern: Pattern) -> None:
    text, words = pattern
    assert list(braces(text)) == words


def test_expand_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "a.tar", "c.TAR", "note.txt", "sub/d.tar", "odd{1,2}[x].tar", "._a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    at = f"{tmp_path}/"
    everything = [at + name for name in ("a.tar", "b.tar", "c.TAR", "odd{1,2}[x].tar")]
    assert files.expand(str(tmp_path), {"tar"}) == everything
    assert files.expand("file://" + at, {"tar"}) == everything
    assert files.expand(at + "*", {"tar"}) == everything
    assert files.expand(at + "**/d.tar", {"tar"}) == [at + "sub/d.tar"]
    assert files.expand(at + "{b,a}.tar", {"tar"}) == [at + "b.tar", at + "a.tar"]
    assert files.expand(at + "odd{1,2}[x].tar", {"tar"}) == [at + "odd{1,2}[x].tar"]
    assert files.expand(f"{at}sub::{at}b.tar", {"tar"}) == [at + "sub/d.tar", at + "b.tar"]
    monkeypatch.chdir(tmp_path)
    assert files.expand("a.tar", {"tar", "txt"}) == ["a.tar"]
    assert files.parent("a.tar") == str(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{a,gone}.tar", "'{}/gone.tar' does not exist"),
        ("sub", "'{}/sub' holds no .tar file"),
        ("*.zip", r"'{}/\*.zip' holds no .tar file"),
        ("note.txt", "'{}/note.txt' holds no .tar file"),
        ("{a,a}.tar", "names '{}/a.tar' twice"),
        ("{0..9}{0..999999}.tar", "more than 1,000,000 names"),
        ("a.tar::", "'' does not exist"),
    ],
)
def test_expand_refuses(source: str, message: str, tmp_path: Path) -> None:
    for name in ("a.tar", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=message.format(tmp_path)):
        files.expand(f"{tmp_path}/{source}", {"tar"})


def test_unknown_schemes_and_absent_packages_are_named() -> None:
    with pytest.raises(UserError, match=r"'nowhere://x/y.tar' cannot be opened \(Protocol not known: nowhere\)"):
        files.stamp("nowhere://x/y.tar")
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from altsight.data import files\n"
        "assert 'fsspec' not in sys.modules and 'aiohttp' not in sys.modules\n"
        "try: files.stamp('s3://b/x.tar')\n"
        "except Exception as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "'s3://b/x.tar' needs s3fs: pip install 'altsight[remote]'.\n"


# On disk.


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(DATA)
    assert files.stamp(str(path)) == files.Stamp(len(DATA), str(path.stat().st_mtime_ns))
    assert files.read(str(path), 10, 5) == DATA[10:15]
    assert files.read(f"file://{path}", 10, 5) == DATA[10:15]
    assert files.read(str(path), len(DATA) - 2, 5) == DATA[-2:]
    assert files.read(str(path), len(DATA) + 9, 5) == b""
    assert files.read_many([(str(path), i, 3) for i in range(50)]) == [DATA[i : i + 3] for i in range(50)]
    assert files.read_whole(str(path), len(DATA)) == DATA
    assert files.read_whole(str(path), len(DATA) - 1) is None
    assert files.read_whole(str(tmp_path), 9) is None
    with files.open_stream(str(path)) as stream:
        assert stream.seek(-3, io.SEEK_END) and stream.read() == DATA[-3:]


def test_vanished_local_files(tmp_path: Path) -> None:
    path = str(tmp_path / "x.tar")
    for action in (files.stamp, files.open_stream, lambda path: files.read(path, 0, 1)):
        with pytest.raises(UserError, match="No such file or directory"):
            action(path)
    assert files.read_whole(path, 9) is None
    Path(path).write_bytes(b"old")
    assert files.read(path, 0, 3) == b"old"
    Path(path).unlink()
    assert files.read(path, 0, 3) == b"old"  # still held open
    Path(path).write_bytes(b"new")
    files.forget()
    assert files.read(path, 0, 3) == b"new"


def test_more_files_than_are_held_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(600)]
    for i, path in enumerate(paths):
        path.write_bytes(b"%04d" % i)
    wanted = [(str(path), 0, 4) for path in paths] * 2
    assert files.read_many(wanted) == [b"%04d" % i for i in range(600)] * 2
    assert len(os.listdir("/proc/self/fd")) < 500
    files.forget()


# S3.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("s3://shards/set/*.tar", TARS),
        ("s3://shards/set/0?.tar", TARS),
        ("s3://shards/set", TARS),
        ("s3://shards/set/", TARS),
        ("s3://shards/set/{02..00}.tar", TARS[::-1]),
        ("s3://shards/set/{00,0[12]}.tar", TARS),
        ("s3://shards/s*/**/9.tar", ["s3://shards/set/sub/9.tar"]),
        ("s3://shards/odd/*", [f"s3://shards/{ODD}"]),
        (f"{TARS[1]}::s3://public", [TARS[1], "s3://public/0.tar"]),
    ],
)
def test_expand_on_s3(source: str, found: list[str], s3: None) -> None:
    assert files.expand(source, {"tar"}) == found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://shards/set/{00..03}.tar", "'s3://shards/set/03.tar' does not exist"),
        ("s3://shards/nowhere/", "does not exist"),
        ("s3://shards/set/*.zip", "holds no .tar file"),
        ("s3://nowhere/x.tar", "does not exist"),
        ("s3://nowhere/*.tar", "holds no .tar file"),
        ("s3://shards/set/0*.tar::s3://shards/set/00.tar", "names 's3://shards/set/00.tar' twice"),
    ],
)
def test_expand_on_s3_refuses(source: str, message: str, s3: None) -> None:
    with pytest.raises(UserError, match=message):
        files.expand(source, {"tar"})


def test_reads_from_s3(s3: None) -> None:
    odd = f"s3://shards/{ODD}"
    first = files.stamp(odd)
    assert first.size == len(DATA) and first.version and first == files.stamp(TARS[0])
    assert files.stamps(TARS) == [first] * 3
    assert files.read(odd, 3, 500) == DATA[3:503]
    assert files.read(odd, 0, 0) == b""
    assert files.read_many([(path, i, 9) for path in TARS for i in range(9)]) == [DATA[i : i + 9] for i in range(9)] * 3
    assert files.read_whole(odd, len(DATA)) == DATA
    assert files.read_whole(odd, 9) is None
    assert files.read_whole("s3://shards/gone.jpg", 9) is None
    assert files.TRAFFIC.retries == 0


def test_s3_refuses(s3: None) -> None:
    for path in ("s3://shards/gone.tar", "s3://nowhere/gone.tar"):
        with pytest.raises(UserError, match="is gone: put it back or run `altsight prepare` again"):
            files.read(path, 0, 9)
        with pytest.raises(UserError, match="does not exist"):
            files.open_stream(path)
    with pytest.raises(UserError, match="is shorter than its index says"):
        files.read(TARS[0], len(DATA), 9)
    assert files.TRAFFIC.retries == 0


def test_public_buckets_need_no_credentials(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    files.forget()
    assert files.read("s3://public/0.tar", 1, 9) == DATA[1:10]
    with pytest.raises(UserError, match=r"may not be read \(asked anonymously, as there are no credentials: 403 "):
        files.read(TARS[0], 1, 9)
    files.forget()


# The web.


def test_reads_from_the_web(web: WebServer) -> None:
    url = web.url + "/set/1.tar?download=true"
    assert files.expand(url, {"tar"}) == [url]
    assert files.expand(web.url + "/set/{2,0}.tar", {"tar"}) == [f"{web.url}/set/{i}.tar" for i in (2, 0)]
    assert files.expand(web.url + "/set/", {"tar"}) == [f"{web.url}/set/{i}.tar" for i in range(3)]
    assert files.expand(web.url + "/set/[12]*", {"tar"}) == [f"{web.url}/set/{i}.tar" for i in (1, 2)]
    assert files.stamp(url).size == len(DATA)
    version = files.stamp(url).version
    web.files["/set/1.tar"] = b""
    assert files.stamp(url).size == 0
    web.files["/set/1.tar"] = DATA + b"more"
    assert files.stamp(url) != (len(DATA) + 4, version)
    web.asked.clear()
    assert files.read(url, 3, 500) == DATA[3:503]
    assert web.asked == [("/set/1.tar", "bytes=3-502")]


@pytest.mark.parametrize("fault", ["stall", "slow", "break", "short", "503", "500", "429", "drop", "garbage"])
def test_passing_faults_are_tried_again(fault: str, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault in ("stall", "slow"):
        monkeypatch.setenv("ALTSIGHT_READ_TIMEOUT", "0.3")
    url = web.fail("/set/0.tar", fault, fault)
    assert files.read(url, 5, 1000) == DATA[5:1005]
    assert files.TRAFFIC.retries == (1 if fault == "drop" else 2)  # aiohttp connects once more by itself
    assert (files.TRAFFIC.requests, files.TRAFFIC.bytes) == (files.TRAFFIC.retries + 1, 1000)
    web.fail("/set/0.tar", fault, fault)
    assert files.stamp(url).size == len(DATA)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stall", r"no answer within 0\.4 s"),
        ("slow", r"no answer within 0\.4 s"),
        ("break", "not completed"),
        ("short", "500 of 1,000 bytes came"),
        ("503", "503 Service Unavailable"),
        ("drop", "Server disconnected"),
        ("garbage", "400 Bad status line"),
        ("400", "400 Bad Request"),
    ],
)
def test_lasting_faults_are_told(fault: str, reason: str, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTSIGHT_READ_TIMEOUT", "0.4")
    url = web.fail("/set/0.tar", fault, always=True)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"'{url}' could not be read in 3 attempts \(at last: .*{reason}"):
        files.read(url, 0, 1000)
    assert time.monotonic() - start < 3 * 0.4 + 0.6
    assert files.TRAFFIC.requests == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "is gone: put it back or run `altsight prepare` again"),
        ("410", "is gone"),
        ("401", r"may not be read \(401 Unauthorized\): set up credentials"),
        ("403", r"may not be read \(403 Forbidden\): set up credentials"),
        ("whole", "yields whole files only"),
    ],
)
def test_final_answers_are_told_at_once(fault: str, message: str, web: WebServer) -> None:
    url = web.fail("/set/0.tar", fault, always=True)
    with pytest.raises(UserError, match=message):
        files.read(url, 5, 1000)
    assert len(web.asked) == 1


def test_servers_without_ranges_still_yield_whole_files(web: WebServer) -> None:
    url = web.fail("/set/0.tar", "whole", always=True)
    assert files.stamp(url).size == len(DATA)
    assert files.read_whole(url, len(DATA)) == DATA


def test_stalled_requests_are_hung_up_and_block_no_others(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTSIGHT_READ_TIMEOUT", "0.4")
    stalled = web.fail("/set/0.tar", "stall", always=True)
    urls = [f"{web.url}/set/{1 + i % 2}.tar" for i in range(40)]
    errors: list[UserError] = []

    def read_stalled() -> None:
        try:
            files.read(stalled, 0, 9)
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=read_stalled) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert files.read_many([(url, 7, 9) for url in urls]) == [DATA[7:16]] * 40
    assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    for _ in range(20 * 3):
        assert web.abandoned.acquire(timeout=1)


def test_read_many_tells_the_first_error(web: WebServer) -> None:
    urls = [f"{web.url}/set/{i}.tar" for i in (0, 7, 1)]
    with pytest.raises(UserError, match=r"7\.tar' is gone"):
        files.read_many([(url, 0, 1) for url in urls])


def test_streams_survive_faults(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 20_000)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(DATA)
            tar.addfile(info, io.BytesIO(DATA))
    web.files["/set/0.tar"] = data = buffer.getvalue()
    url = web.fail("/set/0.tar", "", "503", "", "break", "short", "", "503")
    with files.open_stream(url) as stream, tarfile.open(fileobj=stream, mode="r:") as members:
        assert [members.extractfile(member).read() == DATA for member in members] == [True] * 20
        assert members.getnames() == [f"{i}.jpg" for i in range(20)]
    assert files.TRAFFIC.retries == 4
    with files.open_stream(url) as stream:
        assert stream.seek(100) == 100 and stream.read(50_000) == data[100:50_100]
        assert stream.read() == data[50_100:] and stream.read() == b""
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5 and stream.read(9) == data[-5:]
        with pytest.raises(OSError):
            stream.seek(-1)


def test_bad_settings_are_named(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTSIGHT_READ_TIMEOUT", "soon")
    with pytest.raises(UserError, match="ALTSIGHT_READ_TIMEOUT=soon is no number"):
        files.read(web.url + "/set/0.tar", 0, 1)


# Processes.


def _read_and_collect(path: str, at: int, size: int) -> bytes:
    data = files.read(path, at, size)
    gc.collect()
    return data


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_processes_read_and_leave_the_parent_alone(method: str, s3: None, web: WebServer, tmp_path: Path) -> None:
    local = tmp_path / "x.tar"
    local.write_bytes(DATA)
    paths = [TARS[0], web.url + "/set/0.tar", str(local)]
    for path in paths:
        assert files.read(path, 0, 9) == DATA[:9]
    with multiprocessing.get_context(method).Pool(2) as pool:
        futures = [pool.apply_async(_read_and_collect, (path, i, 9)) for i in range(4) for path in paths]
        assert [future.get(timeout=20) for future in futures] == [DATA[i : i + 9] for i in range(4) for _ in paths]
    # A connection that the child had closed in the loop it shares with us would cost a timeout here.
    assert files.read_many([(path, 5, 9) for path in paths * 5]) == [DATA[5:14]] * 15
    assert files.TRAFFIC.retries == 0


def test_fork_while_threads_read(web: WebServer) -> None:
    url, stop = web.url + "/set/0.tar", threading.Event()

    def keep_reading() -> int:
        count = 0
        while not stop.is_set():
            assert files.read(url, 3, 9) == DATA[3:12]
            count += 1
        return count

    files.read(url, 3, 9)  # a process that is forked while a thread imports modules could not import them
    with ThreadPoolExecutor(3) as readers:
        counts = [readers.submit(keep_reading) for _ in range(3)]
        try:
            for _ in range(5):
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    assert pool.apply_async(_read_and_collect, (url, 4, 9)).get(timeout=10) == DATA[4:13]
        finally:
            stop.set()
    assert all(count.result() for count in counts)
    assert files.TRAFFIC.retries == 0
