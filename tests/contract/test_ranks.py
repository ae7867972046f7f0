"""One rank equals two and four; the whole batch equals the accumulated batch; for every method, gradients included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.core.config import read_json
from altsight.methods import METHODS
from altsight.train.log import read_log

ROOT = Path(__file__).parents[2]


def launch(ranks: int, data: Path, out: Path) -> dict[Any, Any]:
    """Run rank_worker.py under torchrun with `ranks` gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).with_name("rank_worker.py")), str(data), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def worlds(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    """Results of rank_worker.py by world size."""
    out = tmp_path_factory.mktemp("ranks")
    return {n: launch(n, sample_path, out / f"{n}.pt") for n in (1, 2, 4)}


LAST_BATCH_NORM = {"simclr", "mocov3", "byol", "simsiam"}
"""Batch norm takes off what shifts all features alike, so some tensors (the encoder's last bias) have no gradient at
all: what is there is rounding, and is compared with a hundredth of the method's largest gradient."""


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], method: str = "") -> None:
    """Compare tensor by tensor, relative to the tensor's own size: fp32 sums in another order."""
    largest = max(float(expected.abs().max()) for expected in want.values())
    least = 1e-2 * largest if method in LAST_BATCH_NORM else 1e-6
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = expected.abs().max().clamp_min(least)
        assert ((got[name] - expected).abs().max() / scale) < 2e-4, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micro", [0, 2])
def test_ranks_and_accumulation_do_not_change_the_gradient(
    worlds: dict[int, dict[Any, Any]], method: str, ranks: int, micro: int
) -> None:
    want, got = worlds[1][method, 0], worlds[ranks][method, micro]
    assert_same_gradients(got["grads"], want["grads"], method)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_on_one_rank(worlds: dict[int, dict[Any, Any]], method: str) -> None:
    want, got = worlds[1][method, 0], worlds[1][method, 2]
    assert_same_gradients(got["grads"], want["grads"], method)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_world_sees_the_same_samples(worlds: dict[int, dict[Any, Any]], method: str) -> None:
    assert worlds[1][method, 0]["samples"] == worlds[2][method, 0]["samples"] == worlds[4][method, 0]["samples"]
    assert len(set(worlds[1][method, 0]["samples"].values())) > 1


def test_a_wrong_gather_is_noticed(worlds: dict[int, dict[Any, Any]]) -> None:
    """The comparison can fail: halving one tensor's gradient, as a missing term of the gather would, is caught."""
    want = worlds[1]["clip", 0]["grads"]
    wrong = {**want, "encoder.backbone.patch_embed.proj.weight": want["encoder.backbone.patch_embed.proj.weight"] / 2}
    with pytest.raises(AssertionError):
        assert_same_gradients(wrong, want)


def test_the_command_under_torchrun_sees_the_samples_of_one_process(sample_path: Path, tmp_path: Path) -> None:
    """`torchrun -m altsight pretrain` on two ranks: same samples, same losses, one set of files."""
    small = ["--encoder.img-size", "32", "--encoder.depth", "1", "--train.batch", "32", "--train.samples", "128"]
    small += ["--train.precision", "fp32", "--train.log-every", "1", "--data.path", str(sample_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, launcher in ((tmp_path / "one", []), (tmp_path / "two", torchrun)):
        command = [sys.executable, *launcher, "-m", "altsight", "pretrain", "sample_clip", "--out", str(out), *small]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_json(tmp_path / name / "summary.json") for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for fact in ("sample_hash", "initial_encoder", "samples_seen", "data", "flops"):
        assert one[fact] == two[fact], fact
    first, second = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [line["loss"] for line in second] == pytest.approx([line["loss"] for line in first], rel=1e-3)
