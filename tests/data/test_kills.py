"""Killed at 20 random moments, with other ranks and workers each time: the same samples in the same order."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from altsight.core.dist import World
from altsight.core.types import Batch
from altsight.data.loader import Loader
from altsight.data.mix import MixConfig, mix
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import open_prepared
from tests.data.conftest import WriteShards
from tests.data.test_loader import CropMaskText

BATCH, SAMPLES, KILLS = 16, 16 * 250, 20
WORLDS = [(1, 0), (2, 0), (4, 1), (8, 0), (1, 2), (2, 1), (1, 4), (8, 1)]
"""(ranks, workers of each)"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Path:
    """A mixture of two sets of shards, one with broken images."""
    folder = tmp_path_factory.mktemp("kills")
    write_shards(folder / "a", 90, 13)
    write_shards(folder / "b", 40, 9, {3: b"<html>", 21: b""})
    for name in "ab":
        prepare(PrepareConfig(str(folder / name), folder / f"{name}.p", vocab_size=300))
    mix(MixConfig((folder / "a.p", folder / "b.p"), folder / "mixed", (2.0, 1.0), vocab_size=300))
    return folder / "mixed"


def consume(data: Path, journal: Path, ranks: int, workers: int, slowly: float) -> None:
    """Go on from the last whole line of the journal; write a line for every step: what all ranks trained on."""
    source = open_prepared(data).source
    lines = whole_lines(journal)
    seen = lines[-1]["seen"] if lines else 0
    # A line that a kill cut off is a step that no checkpoint holds.
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loader = Loader(source, source.order(5), CropMaskText(), BATCH, workers)
    streams = [loader.batches(World(rank, ranks), seen, SAMPLES) for rank in range(ranks)]
    with journal.open("a", buffering=1) as file:
        for parts in zip(*streams, strict=True):
            seen += BATCH
            step = sorted(facts for batch, _ in parts for facts in described(batch))
            time.sleep(slowly)
            file.write(json.dumps({"seen": seen, "step": step}) + "\n")


def described(batch: Batch) -> list[tuple[int, int, int]]:
    """Return (position, sample, sum over what was made of it)."""
    content = sum(t.flatten(1).long().sum(1) for t in batch.tensors.values())
    return list(zip(batch.positions.tolist(), batch.samples.tolist(), content.tolist(), strict=True))  # type: ignore[union-attr]


def whole_lines(journal: Path) -> list[dict[str, int]]:
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_twenty_kills(data: Path, tmp_path: Path) -> None:
    consume(data, tmp_path / "whole", 1, 0, 0)
    draw, kills, journal = random.Random(1), 0, tmp_path / "killed"
    fork = multiprocessing.get_context("fork")
    places = [0]
    while kills < KILLS:
        ranks, workers = WORLDS[kills % len(WORLDS)]
        child = fork.Process(target=consume, args=(data, journal, ranks, workers, 0.02))
        child.start()
        time.sleep(draw.uniform(0.05, 0.6))
        assert child.pid is not None and child.is_alive(), "the run was over before it was killed"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        places.append(len(whole_lines(journal)))
    assert sum(a < b for a, b in pairwise(places)) >= 5, "too few kills hit a run on its way"
    consume(data, journal, 4, 0, 0)
    assert whole_lines(journal) == whole_lines(tmp_path / "whole")
