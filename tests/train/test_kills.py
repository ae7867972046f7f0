"""A real training run, killed at 20 random moments: the same samples, and the same bits at the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from altsight.data.prepared import Prepared
from altsight.train.log import read_log
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


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_the_run(sample_data: Prepared, tmp_path: Path, sent: signal.Signals) -> None:
    """As a scheduler sends SIGTERM and a terminal Ctrl-C: to those that decode, too."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "altsight", "pretrain", "sample_mae", "--out", str(out), "--data.workers", "2"]
    command += ["--data.path", str(sample_data.directory), "--encoder.img-size", "32", "--encoder.depth", "1"]
    command += [
        "--train.batch",
        "32",
        "--train.samples",
        "64000",
        "--train.precision",
        "fp32",
        "--train.log-every",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while run.poll() is None and not read_log(out):
        time.sleep(0.1)
    os.killpg(run.pid, sent)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and "run it again to go on" in said
    assert list(out.glob("checkpoints/samples_*.pt"))
