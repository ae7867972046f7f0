"""2N steps equal N steps, SIGKILL, and resume for the rest: bit for bit, for every method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.data.prepared import Prepared
from altsight.methods import METHODS
from altsight.train.checkpoint import load_latest
from altsight.train.loop import Stopped, pretrain
from tests.contract.tiny import tiny_run

ROOT = Path(__file__).parents[2]
SAMPLES, HALF = 16 * 40, 16 * 20


def start(method: str, data: Path, out: Path, samples: int = SAMPLES, every: int = HALF) -> subprocess.Popen[bytes]:
    """Start resume_worker.py: train `samples` samples, with a checkpoint at every multiple of `every`."""
    command = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), method]
    command += [str(data), str(out), str(samples), str(every)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(path: Path, worker: subprocess.Popen[bytes]) -> None:
    """Wait until `path` is there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert worker.poll() is None and time.monotonic() < end, "the worker ended before its first checkpoint"
        time.sleep(0.002)


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    """Compare nested checkpoints bit for bit; times are left out."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a.keys() - {"wall_seconds", "wait_seconds"}:
            assert_identical(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}/{number}")
    else:
        assert a == b, where


def final_state(directory: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    state = load_latest(directory / "checkpoints", print)
    assert state is not None
    return state


KILLED = ("clip", "mug")
"""Methods that are killed in every run of the tests: with and without losses over the batch. The others: `slow`."""


@pytest.mark.parametrize("method", METHODS)
def test_stop_and_resume_is_bit_identical(method: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run(method, sample_data.directory, 16 * 6, batch=16, checkpoint_every=16, probe_every=16 * 3)
    whole = pretrain(run, sample_data, tmp_path / "whole")

    def interrupt(trained: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped):
        pretrain(run, sample_data, tmp_path / "cut", interrupt)
    assert final_state(tmp_path / "cut")["state"]["samples_seen"] == 16 * 3
    resumed = pretrain(run, sample_data, tmp_path / "cut")
    assert resumed.sample_hash == whole.sample_hash
    assert_identical(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


@pytest.mark.parametrize(
    "method", [name if name in KILLED else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_kill_and_resume_is_bit_identical(method: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run(method, sample_data.directory, SAMPLES, batch=16, checkpoint_every=HALF)
    whole = pretrain(run, sample_data, tmp_path / "whole")
    worker = start(method, sample_data.directory, tmp_path / "killed")
    wait_for(tmp_path / "killed/checkpoints" / f"samples_{HALF:012d}.json", worker)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (tmp_path / "killed/summary.json").exists(), "the worker was done before it was killed"
    resumed = pretrain(run, sample_data, tmp_path / "killed")
    assert resumed.sample_hash == whole.sample_hash
    assert_identical(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


def test_sigterm_saves_and_stops(sample_data: Prepared, tmp_path: Path) -> None:
    worker = start("clip", sample_data.directory, tmp_path)
    wait_for(tmp_path / "log.jsonl", worker)
    while not (tmp_path / "log.jsonl").read_text():
        time.sleep(0.01)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) != 0
    state = final_state(tmp_path)["state"]
    assert 0 < state["samples_seen"] < SAMPLES
    assert not (tmp_path / "summary.json").exists()
