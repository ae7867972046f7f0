"""A real training run, killed at 20 random moments: the same samples, and the same bits at the end."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from altsight.data.prepared import Prepared
from altsight.train.loop import pretrain
from tests.contract.test_resume import assert_identical, final_state, start
from tests.contract.tiny import tiny_run

SAMPLES, EVERY, KILLS = 16 * 1500, 16 * 5, 20


def newest(out: Path) -> int:
    """Return the samples seen of the newest whole checkpoint."""
    return max((int(path.stem.removeprefix("samples_")) for path in out.glob("checkpoints/*.json")), default=0)


@pytest.mark.slow
def test_twenty_kills_of_a_training_run(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, SAMPLES, batch=16, checkpoint_every=EVERY)
    whole = pretrain(run, sample_data, tmp_path / "whole")
    draw, out = random.Random(0), tmp_path / "killed"
    for _ in range(KILLS):
        worker = start("clip", sample_data.directory, out, SAMPLES, EVERY)
        before, end = newest(out), time.monotonic() + 120
        while newest(out) == before:
            assert worker.poll() is None and time.monotonic() < end, "the run ended before it was killed"
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.7))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert not (out / "summary.json").exists()
    killed = pretrain(run, sample_data, out)
    assert killed.sample_hash == whole.sample_hash
    assert_identical(final_state(out), final_state(tmp_path / "whole"))
