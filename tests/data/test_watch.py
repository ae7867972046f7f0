"""When a batch is late, the log says what it waits for; past the limit the run stops with the same words."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.loader import Loader
from altsight.data.prepare import read_pairs
from altsight.data.sources import Pairs
from tests.data.conftest import WriteShards
from tests.data.test_loader import CropMaskText


@dataclasses.dataclass(frozen=True)
class Slow(Pairs):
    """Pairs on a disk that hangs at one of them."""

    seconds: float = 0

    def document(self, i: int, at: Key) -> Document:
        if i == 3:
            time.sleep(self.seconds)
        return super().document(i, at)


@dataclasses.dataclass(frozen=True)
class SlowPrepare(CropMaskText):
    """A method whose preparation hangs."""

    def __call__(self, document: Document, at: Key) -> Example | None:
        if "thing 3" in document.texts[0] or "title 3" in document.texts[0]:
            time.sleep(1.5)
        return super().__call__(document, at)


@pytest.fixture
def pairs(tmp_path: Path, write_shards: WriteShards) -> Pairs:
    return read_pairs(str(write_shards(tmp_path / "data", 8, 4)))


def loader(source: Pairs, workers: int, said: list[str], **settings: float) -> Loader:
    return Loader(source, source.order(0), CropMaskText(), 8, workers, say=said.append, **settings)  # type: ignore[arg-type]


def slow(pairs: Pairs, seconds: float) -> Slow:
    return Slow(pairs.index, pairs.captions, seconds=seconds)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_late_batch_is_reported_with_shard_and_stage(pairs: Pairs, workers: int) -> None:
    said: list[str] = []
    list(loader(slow(pairs, 1.5), workers, said, late=0.5).batches(World(), 0, 8))
    assert len(said) == 1
    assert "the batch at sample 0 is late by 0.5 s: worker 0 has been reading" in said[0]
    assert f"{pairs.name(3)} for " in said[0]


def test_the_stage_is_told(pairs: Pairs) -> None:
    said: list[str] = []
    watched = dataclasses.replace(loader(pairs, 1, said, late=0.7), prepare=SlowPrepare())
    list(watched.batches(World(), 0, 8))
    assert f"has been decoding {pairs.name(3)}" in said[0]


def test_nothing_is_said_of_batches_in_time(pairs: Pairs) -> None:
    said: list[str] = []
    list(loader(pairs, 1, said, late=20).batches(World(), 0, 24))
    assert said == []


@pytest.mark.parametrize("workers", [0, 2])
def test_past_the_limit_the_run_stops(pairs: Pairs, workers: int) -> None:
    before = time.monotonic()
    seconds = 2 if workers == 0 else 60
    stuck = slow(pairs, seconds)
    with pytest.raises(UserError, match=r"no data came for 1 s, worker \d has been .* --data.stall-limit") as caught:
        list(loader(stuck, workers, [], late=0.5, limit=1).batches(World(), 0, 8))
    assert ("reading " + pairs.name(3) in str(caught.value)) or workers == 0
    assert time.monotonic() - before < 15
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Dies(Pairs):
    """Pairs whose third takes the whole process with it, as running out of memory does."""

    def document(self, i: int, at: Key) -> Document:
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().document(i, at)


def test_a_worker_that_dies_is_named(pairs: Pairs) -> None:
    with pytest.raises(UserError, match=r"a process that decodes images died .* lower --data.workers") as caught:
        list(loader(Dies(pairs.index, pairs.captions), 1, []).batches(World(), 0, 8))
    assert "\n" not in str(caught.value)
