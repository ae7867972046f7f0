"""The cache of blocks under many processes, kills, tiny limits and full disks."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from altsight.core.errors import UserError
from altsight.data import cache as cache_module
from altsight.data.cache import Cache, open_cache

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def warnings_are_new() -> Iterator[None]:
    cache_module._warn.cache_clear()
    yield
    cache_module._warn.cache_clear()


def block(name: str, size: int = 1000) -> bytes:
    """Return the content of a block, which shows whether it is whole and the right one."""
    return (name.encode() * size)[:size]


def never() -> bytes:
    raise AssertionError("it is there already")


def held(folder: Path) -> int:
    """Return the bytes of all whole blocks, while none comes or goes."""
    folder.mkdir(exist_ok=True)
    with cache_module._locked(folder / "total"):
        return sum(path.stat().st_size for path in folder.glob("*.block"))


def leave(cache: Cache, *names: str, ago: float = 0) -> None:
    """Put blocks into the cache as if they had last been used `ago` seconds ago."""
    for name in names:
        path = cache.path(name, lambda name=name: block(name))
        os.utime(path, (time.time() - ago,) * 2)


def keeps(cache: Cache, name: str) -> bool:
    return cache._path(name).exists()


def test_blocks_are_fetched_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder", 10**6)
    assert cache.read("x", 10, 5, lambda: block("x")) == b"xxxxx"
    assert cache.read("x", 0, 10**6, never) == block("x")
    assert cache.read("x", 998, 9, never) == b"xx"
    assert cache.path("x", never).read_bytes() == block("x")
    assert cache.read("empty", 0, 9, lambda: b"") == b"" and cache.read("empty", 0, 9, never) == b""
    cache.drop("x")
    cache.drop("x")
    assert cache.read("x", 0, 3, lambda: b"new") == b"new"
    assert pickle.loads(pickle.dumps(cache)) == cache


def test_names_lead_nowhere(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10**6)
    names = ["../../evil", "/etc/passwd", "a/b", "a" * 9999, "", "\0", "é\udcff", "total", "x.part", "X", "x"]
    for name in names:
        cache.path(name, lambda name=name: repr(name).encode())
    assert all(cache.read(name, 0, 10**5, never) == repr(name).encode() for name in names)
    assert os.listdir(tmp_path) == ["cache"]
    assert len(os.listdir(tmp_path / "cache")) == len(names) + 1


def test_least_recently_used_blocks_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_500)
    for i in range(10):
        leave(cache, str(i), ago=1000 - i)
    (tmp_path / "other.txt").write_bytes(bytes(99_999))
    cache.read("0", 0, 1, never)  # used now, so 1 and 2 are the oldest
    cache.read("new", 0, 1, lambda: block("new"))
    assert [name for name in map(str, range(10)) if not keeps(cache, name)] == ["1", "2"]
    assert keeps(cache, "new") and held(tmp_path) == 9000 <= 0.9 * 10_500
    assert (tmp_path / "other.txt").exists()


def test_a_use_is_noted_at_most_once_a_minute(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    for ago in (30, 90):
        leave(cache, "x", ago=ago)
        cache.read("x", 0, 1, never)
        noted = time.time() - cache._path("x").stat().st_mtime < 10
        assert noted is (ago > 60)


def test_what_is_open_stays_readable(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2500)
    with cache.path("old", lambda: block("old")).open("rb") as file:
        leave(cache, "a", "b", "c", "d")
        assert not keeps(cache, "old")
        assert file.read() == block("old")


def test_the_total_mends_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5500)
    leave(cache, "a", "b")
    for total in (b"", b"nonsense", b"%020d" % 10**9):
        (tmp_path / "total").write_bytes(total)
        leave(cache, "c")
        assert int((tmp_path / "total").read_bytes()) == 3000
        assert keeps(cache, "a") and keeps(cache, "b")
        cache.drop("c")


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    for error in (
        UserError("gone"),
        FileNotFoundError("gone"),
        OSError(errno.ENOSPC, "not the cache's"),
        KeyboardInterrupt(),
    ):

        def fail(error: BaseException = error) -> bytes:
            raise error

        with pytest.raises(type(error)) as raised:
            cache.read("x", 0, 1, fail)
        assert raised.value is error
    assert os.listdir(tmp_path) == []
    assert cache.read("x", 0, 1, lambda: b"x") == b"x"


def test_a_fetch_may_read_other_blocks(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)

    def outer(name: str) -> bytes:
        return b"".join(cache.read(f"inner {i}", 0, 99, lambda i=i: b"%d" % i) for i in range(300))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cache.read(f"outer {i % 4}", 0, 9, lambda: outer("x")), range(16)))
    assert found == [b"012345678"] * 16


# Where it cannot be kept.


def test_a_limit_below_one_block(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 999)
    with pytest.warns(RuntimeWarning, match=r"is passed over: a block has 1,000 bytes and all may have 999") as seen:
        for _ in range(3):
            assert cache.read("x", 998, 9, lambda: block("x")) == b"xx"
    assert len(seen) == 1
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="a block has 1,000 bytes and all may have 999: free some space"):
        cache.path("x", lambda: block("x"))


@pytest.mark.parametrize("place", ["/proc/nowhere/cache", "/dev/null", "/dev/null/cache"])
def test_a_folder_that_cannot_be_written(place: str) -> None:
    cache = Cache(Path(place), 10**6)
    with pytest.warns(RuntimeWarning, match=f"the cache in '{place}' is passed over: it cannot be") as seen:
        assert [cache.read("x", 1, 2, lambda: b"data") for _ in range(3)] == [b"at"] * 3
    assert len(seen) == 1
    with pytest.raises(UserError, match="choose another --data"):
        cache.path("x", lambda: b"data")


@pytest.mark.parametrize("full_at", [0, 500])
def test_a_full_disk(full_at: int, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.path("kept", lambda: block("kept", 100))

    def fill() -> int:
        # The system refuses larger files, as a full disk refuses more bytes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for name in ("x", "y"):
                assert cache.read(name, 998, 9, lambda name=name: block(name)) == name.encode() * 2
            assert cache.read("kept", 0, 4, never) == b"kept"
        return len(seen)

    assert in_child(fill) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".block"]
    assert cache.read("x", 0, 1, lambda: block("x")) == b"x" and cache.read("x", 0, 1, never) == b"x"


def in_child(task: Callable[[], int]) -> int:
    """Return what `task` returns in a process of its own."""
    answers, answer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: answer.send(task()))
    child.start()
    answer.close()
    found: int = answers.recv()
    child.join()
    return found


# Many processes.


def _hammer(cache: Cache, seed: int, names: int, seconds: float, fetched: Path) -> None:
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        name = f"block {int(names * rng.random() ** 2)} "
        size = 500 + 37 * (hash(name) % 50)

        def fetch(name: str = name, size: int = size) -> bytes:
            with fetched.open("ab", buffering=0) as log:
                log.write(b"x")
            return block(name, size)

        at = rng.randrange(size)
        if rng.random() < 0.5:
            assert cache.read(name, at, 99, fetch) == block(name, size)[at : at + 99]
        else:
            with contextlib.suppress(FileNotFoundError):  # others may need the room at once
                assert cache.path(name, fetch).read_bytes() == block(name, size)


def _all_exit(processes: list[multiprocessing.context.ForkProcess]) -> None:
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def test_many_processes_share_a_small_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 20_000)
    fetched = tmp_path / "fetched"
    processes = [FORK.Process(target=_hammer, args=(cache, seed, 60, 2.0, fetched)) for seed in range(8)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert held(cache.folder) <= cache.limit
        time.sleep(0.005)
    _all_exit(processes)
    assert fetched.stat().st_size > 100  # blocks have been removed and fetched again
    assert list(cache.folder.glob("*.part")) == []
    assert held(cache.folder) <= int((cache.folder / "total").read_bytes()) <= cache.limit


def test_a_block_is_fetched_by_one_process_only(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path / "c", 10**6), tmp_path / "log"
    go = FORK.Barrier(8)

    def ask() -> None:
        go.wait()
        for i in range(20):

            def fetch(i: int = i) -> bytes:
                with log.open("ab", buffering=0) as file:
                    file.write(b"x")
                time.sleep(0.01)
                return block(str(i))

            with ThreadPoolExecutor(3) as pool:
                assert set(pool.map(lambda name: cache.read(name, 0, 9, fetch), [str(i)] * 3)) == {block(str(i))[:9]}

    processes = [FORK.Process(target=ask) for _ in range(8)]
    for process in processes:
        process.start()
    _all_exit(processes)
    assert log.stat().st_size == 20


def test_a_kill_in_the_middle_of_a_fetch(tmp_path: Path) -> None:
    cache, started = Cache(tmp_path, 10**6), FORK.Event()

    def hang() -> bytes:
        started.set()
        time.sleep(60)
        return b"never"

    victim = FORK.Process(target=cache.read, args=("x", 0, 1, hang))
    victim.start()
    assert started.wait(10)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.read, "x", 0, 9, lambda: b"whole")
        time.sleep(0.1)
        assert not waiting.done()
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        assert waiting.result(timeout=5) == b"whole"
    assert cache.read("x", 0, 9, never) == b"whole"


def test_kills_at_any_moment_leave_only_whole_blocks(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path / "c", 20_000), tmp_path / "fetched"
    rng = random.Random(0)
    for _ in range(20):
        victims = [FORK.Process(target=_hammer, args=(cache, rng.random(), 60, 60.0, fetched)) for _ in range(3)]
        for victim in victims:
            victim.start()
        time.sleep(rng.uniform(0.01, 0.06))
        for victim in victims:
            victim.kill()
            victim.join()
    assert held(cache.folder) <= cache.limit
    _hammer(cache, 1, 60, 0.3, fetched)  # every block that is left is whole, and nothing is locked
    for i in range(60):
        name = f"block {i} "
        size = 500 + 37 * (hash(name) % 50)
        assert cache.read(name, 0, size, lambda name=name, size=size: block(name, size)) == block(name, size)


def test_a_failed_fetch_hands_over_to_who_waits(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    with ThreadPoolExecutor(4) as pool:
        waiting = []

        def fail() -> bytes:
            waiting.extend(pool.submit(cache.read, "x", 0, 9, lambda: b"whole") for _ in range(4))
            time.sleep(0.1)
            raise UserError("gone")

        with pytest.raises(UserError, match="gone"):
            cache.read("x", 0, 9, fail)
        assert [future.result(timeout=5) for future in waiting] == [b"whole"] * 4
    assert cache.read("x", 0, 9, never) == b"whole"


def test_a_process_that_is_forked_keeps_no_lock(tmp_path: Path) -> None:
    done = FORK.Event()
    child = FORK.Process(target=done.wait)
    with cache_module._locked(tmp_path / "total"):
        child.start()
    locked = threading.Event()

    def lock() -> None:
        with cache_module._locked(tmp_path / "total"):
            locked.set()

    thread = threading.Thread(target=lock)
    thread.start()
    was_free = locked.wait(5)
    done.set()
    child.join()
    thread.join()
    assert was_free


def test_abandoned_parts_are_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    fetching, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        fetching.set()
        assert go_on.wait(10)
        return block("slow")

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(cache.read, "slow", 0, 4, slow)
        assert fetching.wait(10)
        (tmp_path / "dead.part").write_bytes(bytes(500))
        (tmp_path / "recent.part").write_bytes(bytes(500))
        for part in tmp_path.glob("*.part"):
            if part.name != "recent.part":
                os.utime(part, (time.time() - 7200,) * 2)
        leave(cache, *"abcd")
        assert not (tmp_path / "dead.part").exists() and (tmp_path / "recent.part").exists()
        go_on.set()
        assert busy.result(timeout=10) == b"slow"
    assert cache.read("slow", 0, 4, never) == b"slow"


def test_runs_with_other_limits_share_a_folder(tmp_path: Path) -> None:
    large, small = Cache(tmp_path, 10_000), Cache(tmp_path, 3000)
    leave(large, *"abcdef", ago=100)
    small.read("g", 0, 1, lambda: block("g"))
    assert held(tmp_path) <= 3000 and large.read("g", 0, 1, never) == b"g"


def test_open_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache("", 0) is None
    assert open_cache("", 0.5) == Cache(tmp_path / "altsight" / "blocks", 500_000_000)
    assert open_cache("/elsewhere", 2) == Cache(Path("/elsewhere"), 2_000_000_000)
    assert not list(tmp_path.iterdir())


def test_importing_is_cheap() -> None:
    code = "import sys, altsight.data.cache; print([m for m in ('fsspec', 'torch', 'numpy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"
