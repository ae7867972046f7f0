"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from altsight.core.errors import UserError


def check_out(out: Path, marker: str, written: Collection[str]) -> None:
    """Refuse to replace anything but an empty folder, or one with the file `marker` and nothing but `written` files."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file: give --out a folder that does not exist yet.")
    held = set(os.listdir(out))
    if held and (marker not in held or held.difference(written)):
        raise UserError(
            f"the folder '{out}' holds other files than a prepared data set: give --out a folder that does not exist "
            "yet."
        )


@contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when the body is done, and vanishes when it raises."""
    target = out.resolve()
    home = home_of(out)
    new, old = home / f".{target.name}.new-{os.getpid()}", home / f".{target.name}.old-{os.getpid()}"
    _remove_left_behind(home, target.name)
    try:
        with writing(out):
            new.mkdir()
        yield new
        with writing(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(old)
            new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _remove_left_behind(home: Path, name: str) -> None:
    """Remove what processes were writing that have been killed."""
    for left in home.glob(f".{name}.new-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # somebody else's process, and alive
            pass


def home_of(out: Path) -> Path:
    """Return the first parent of `out` that exists; others are made last, so that a failure leaves none behind."""
    return next(parent for parent in out.resolve().parents if parent.exists())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError of the body into a UserError about the folder `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}): give --out another folder.") from None
