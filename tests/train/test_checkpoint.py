"""Checkpoints: atomic, checked, kept; damage and a full disk never cost the one before."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altsight.core.errors import UserError
from altsight.train.checkpoint import load_latest, save

ROOT = Path(__file__).parents[2]


def state(value: float) -> dict[str, object]:
    return {"method": {"w": torch.full((1000,), value)}, "state": {"samples_seen": int(value)}}


def test_keeps_the_newest(tmp_path: Path) -> None:
    for n in (1, 2, 3, 4):
        save(tmp_path, n, state(n), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"samples_{n:012d}.{suffix}" for n in (3, 4) for suffix in ("json", "pt")
    ]
    latest = load_latest(tmp_path, pytest.fail)
    assert latest is not None and latest["state"]["samples_seen"] == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "no checksum", "empty"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, state(1), keep=3)
    path = save(tmp_path, 2, state(2), keep=3)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").unlink()
    said: list[str] = []
    latest = load_latest(tmp_path, said.append)
    assert latest is not None and latest["state"]["samples_seen"] == 1
    assert len(said) == 1 and "damaged" in said[0] and path.name in said[0]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), keep=3).write_bytes(b"x")
    with pytest.raises(UserError, match="every checkpoint"):
        load_latest(tmp_path, print)


def test_none_yet(tmp_path: Path) -> None:
    assert load_latest(tmp_path, print) is None


SAVE_UNDER_A_LIMIT = """
import resource, signal, sys, torch
from pathlib import Path
from altsight.core.errors import UserError
from altsight.train.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
save(folder, 1, {"w": torch.zeros(1000)}, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, 2, {"w": torch.zeros(1_000_000)}, keep=2)
except UserError as error:
    print(error)
"""


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write halfway, as a full disk does."""
    assert resource.RLIMIT_FSIZE
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.count("\n") == 1 and "could not be saved" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples_000000000001.json", "samples_000000000001.pt"]
    latest = load_latest(tmp_path, pytest.fail)
    assert latest is not None and len(latest["w"]) == 1000


def test_disk_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 1, state(1), keep=2)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        save(tmp_path, 2, state(2), keep=2)
    monkeypatch.undo()
    latest = load_latest(tmp_path, pytest.fail)
    assert latest is not None and latest["state"]["samples_seen"] == 1
