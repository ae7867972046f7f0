"""Two ranks learn what one does: batch norm sees the rows of both, and mixing does not cross the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.transfer.test_finetune import folder_of, weights

ROOT = Path(__file__).parents[2]


def launch(ranks: int, folder: Path) -> list[str]:
    """Run rank_worker.py under torchrun, and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).with_name("rank_worker.py")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.split(" ")[0] in ("finetune", "features", "crops")]


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 12)
    folder_of(tmp_path / "test", 5, offset=100)
    alone, together = launch(1, tmp_path), launch(2, tmp_path)
    assert len(alone) == 3 and alone == together
    for name in ("finetune", "features", "crops"):
        expected, found = weights(tmp_path / f"{name}-1"), weights(tmp_path / f"{name}-2")
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, atol=1e-4, rtol=1e-3)
