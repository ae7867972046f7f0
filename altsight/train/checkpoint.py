"""Atomic checkpoints: written beside, flushed, renamed; read back with a checksum; the last few are kept."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from altsight.core.config import write_json
from altsight.core.errors import UserError


def save(directory: Path, samples_seen: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint at `samples_seen` and drop all but the newest `keep`.

    A checkpoint is `samples_N.pt` with `samples_N.json` (its SHA-256) beside it; without the second it is not whole.

    Raises:
        UserError: the disk is full; earlier checkpoints are left as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"samples_{samples_seen:012d}.pt"
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(part)
        part.replace(path)
        write_json(path.with_suffix(".json"), {"samples_seen": samples_seen, "sha256": digest})
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(_cannot_save(path, error)) from None
    for old in sorted(directory.glob("samples_*.pt"))[:-keep]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    return path


def load_latest(directory: Path, warn: Any) -> dict[str, Any] | None:
    """Return the state of the newest whole checkpoint, on the CPU; None where there is none.

    A damaged checkpoint is passed over in favour of the one before; `warn` is called with a sentence that says so.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    paths = sorted(directory.glob("samples_*.pt"), reverse=True)
    for number, path in enumerate(paths):
        state = _load(path)
        if state is not None:
            if number:
                warn(f"The checkpoint '{paths[0]}' is damaged; going on from the one before, '{path}'.")
            return state
    if paths:
        raise UserError(f"every checkpoint in '{directory}' is damaged: remove the folder to start the run anew.")
    return None


def _load(path: Path) -> dict[str, Any] | None:
    import json

    try:
        expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
        if _sha256(path) != expected:
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    return state if isinstance(state, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_save(path: Path, error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full or "No space" in str(error) else str(error).splitlines()[0]
    return (
        f"the checkpoint '{path}' could not be saved ({why}): free some space and run the same command again, "
        "which goes on from the checkpoint before."
    )
