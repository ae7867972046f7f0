"""What a run's folder says about the run: enough to load it without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from altsight.core.config import from_dict, read_json, write_json
from altsight.core.errors import UserError
from altsight.data.prepared import Prepared
from altsight.train.run import Run, identity, save_run


def claim(directory: Path, run: Run[Any]) -> None:
    """Make sure that run.json, if it is there, describes the same run (apart from where and how fast it computes)."""
    path = directory / "run.json"
    if path.exists() and not _is_the_same(path, run):
        raise UserError(f"'{directory}' holds another run: choose another --out, or remove it.")


def _is_the_same(path: Path, run: Run[Any]) -> bool:
    written = read_json(path)
    if not isinstance(written, dict) or written.get("name") != run.name:
        return False
    kind: Any = Run[type(run.method)]  # type: ignore[misc]
    return bool(identity(from_dict(written, kind, str(path))) == identity(run))


def describe(run: Run[Any], prepared: Prepared, directory: Path) -> None:
    """Write what it takes to load the run without its data: the settings, the tokenizer, the class names."""
    directory.mkdir(parents=True, exist_ok=True)
    if prepared.tokenizer is not None:
        prepared.tokenizer.save(directory / "tokenizer.json")
    write_json(directory / "classes.json", list(prepared.classes))
    save_run(run, directory / "run.json")
