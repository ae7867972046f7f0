"""Preparing is parallel, goes on after an interruption, and reads only what is new when shards are added."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from altsight.core.errors import UserError
from altsight.data import parts
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.sources import Pairs
from tests.data.conftest import WriteShards


@pytest.fixture
def data(tmp_path: Path, write_shards: WriteShards) -> Path:
    return write_shards(tmp_path / "data", samples=30, per_shard=3)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(str(data), tmp_path / "out", label="class", vocab_size=300, workers=1)


def rows(prepared: Prepared) -> list[tuple[int, int, int]]:
    assert isinstance(prepared.source, Pairs)
    return [tuple(row) for row in prepared.source.index.rows.tolist()]


def read_in(config: PrepareConfig) -> list[int]:
    """Prepare and return the counts of shards that were said to be read."""
    seen: list[int] = []
    prepare(config, lambda what, done, total: seen.append(done) if what == "indexing shards" else None)
    return seen


def test_processes_find_what_one_finds(config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = prepare(config)
    monkeypatch.setattr(parts, "SMALL", 0)
    together = prepare(replace(config, out=tmp_path / "together", workers=3))
    assert rows(together) == rows(alone)
    assert together.hash() == alone.hash()
    assert together.statistics == alone.statistics


def test_added_shards_are_read_and_the_others_are_not(config: PrepareConfig, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "later"
    kept.mkdir()
    late = [data / "00002.tar", data / "00009.tar"]
    for shard in late:
        shard.rename(kept / shard.name)
    first = prepare(config)
    tokenizer = (config.out / "tokenizer.json").read_bytes()
    for shard in late:
        (kept / shard.name).rename(shard)
    assert read_in(config) == [9, 10]
    grown = open_prepared(config.out)
    fresh = prepare(replace(config, out=tmp_path / "fresh"))
    assert rows(grown) == rows(fresh)
    assert grown.hash() == fresh.hash() != first.hash()
    assert grown.classes == fresh.classes
    # What was trained on the smaller data still fits.
    assert (config.out / "tokenizer.json").read_bytes() == tokenizer


def test_a_shard_that_changed_is_read_again_and_one_that_is_gone_is_left_out(
    config: PrepareConfig, data: Path, tmp_path: Path
) -> None:
    prepare(config)
    time.sleep(0.01)
    shutil.copy(data / "00004.tar", data / "00003.tar")
    assert read_in(config) == [10]
    (data / "00000.tar").unlink()
    assert read_in(config) == []
    assert rows(open_prepared(config.out)) == rows(prepare(replace(config, out=tmp_path / "fresh")))


def test_other_settings_read_everything_again(config: PrepareConfig) -> None:
    prepare(config)
    assert read_in(replace(config, captions=("{title}",))) == list(range(1, 11))


def test_all_damaged_shards_are_named_at_once_and_can_be_left_out(config: PrepareConfig, data: Path) -> None:
    for name in ("00001", "00005", "00007"):
        path = data / f"{name}.tar"
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert "3 of 10 shards cannot be read (00001.tar, 00005.tar, 00007.tar)" in str(caught.value)
    assert "--skip-damaged" in str(caught.value) and "\n" not in str(caught.value)
    assert not config.out.exists()
    # The whole ones are remembered, the damaged ones are looked at again.
    assert read_in(replace(config, skip_damaged=True)) == [8, 9, 10]
    found = open_prepared(config.out).source.parts()
    assert sum(found.values()) == 21
    assert "00005.tar" not in found
    for path in data.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="10 of 10 shards"):
        prepare(replace(config, skip_damaged=True))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_stopped_and_called_again_it_goes_on(tmp_path: Path, write_shards: WriteShards, how: signal.Signals) -> None:
    data = write_shards(tmp_path / "data", 6000, 300)
    command = [sys.executable, "-m", "altsight", "prepare", str(data), "--out", str(tmp_path / "out")]
    command += ["--vocab-size", "300", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    work = tmp_path / ".out.parts"
    while len(list(work.glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    if how is not signal.SIGKILL:
        assert process.returncode == 130
        assert said.splitlines()[-1].endswith("run the same command again to go on with the shards that are left.")
        assert "Traceback" not in said
    known = len(list(work.glob("*.json")))
    assert 3 <= known < 20
    assert not (tmp_path / "out").exists()
    config = PrepareConfig(str(data), tmp_path / "out", vocab_size=300)
    assert read_in(config)[0] == known + 1
    whole = prepare(replace(config, out=tmp_path / "whole"))
    assert rows(open_prepared(tmp_path / "out")) == rows(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out", "whole"}
