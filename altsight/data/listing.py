"""Lists of files with labels, for what is no image-text pair (videos, slides), and files of class names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altsight.core.errors import UserError, did_you_mean

TABLES = frozenset({".csv", ".tsv", ".jsonl"})


@dataclass(frozen=True)
class Item:
    """A file, or a folder that stands for one, with its label ("" where none is known)."""

    path: Path
    label: str = ""


def list_items(where: Path, is_item: Callable[[Path], bool], what: str) -> list[Item]:
    """Return the items at `where`, sorted by path within a class.

    `where` is an item itself, a folder of items, a folder of class folders of items, or a table (CSV, TSV, JSON lines)
    with the columns path, relative to the table's folder, and label.

    Args:
        is_item: whether a path is one.
        what: what an item is called in messages, such as "video".

    Raises:
        UserError: there are none.
    """
    if not where.exists():
        raise UserError(f"'{where}' does not exist: name a {what}, a folder or a table of them.")
    if is_item(where):
        return [Item(where)]
    if where.is_file():
        items = _table(where, what)
    else:
        entries = sorted(where.iterdir())
        items = [Item(path) for path in entries if is_item(path)]
        for folder in (path for path in entries if path.is_dir() and not is_item(path)):
            items += [Item(path, folder.name) for path in sorted(folder.iterdir()) if is_item(path)]
    if not items:
        raise UserError(f"there is no {what} in '{where}'.")
    return items


def read_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """Return class -> its names, at least one each, in the order of the file.

    Either lines of `class`, or `class | other name | ...`, where the class itself is its first name; or JSON with
    class -> name or list of names.

    Raises:
        UserError: the file is missing, empty, or names a class twice.
    """
    if path.suffix == ".json":
        rows = _json_classes(path)
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"the class file '{path}' cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            raise UserError(f"the class file '{path}' is no text in UTF-8: save it as such.") from None
        names = [tuple(part.strip() for part in line.split("|") if part.strip()) for line in lines]
        rows = [(parts[0], parts) for parts in names if parts]
    classes: dict[str, tuple[str, ...]] = {}
    for label, found in rows:
        if label in classes:
            raise UserError(f"the class file '{path}' names '{label}' twice: every class needs a name of its own.")
        classes[label] = found
    if not classes:
        raise UserError(f"the class file '{path}' names no class.")
    return classes


def check_labels(items: Sequence[Item], classes: Sequence[str], where: Path, all_have_folders: bool = True) -> None:
    """Raise UserError if an item has a label that is no class.

    all_have_folders: raise it, too, if `where` is a folder of class folders and a class has none.
    """
    for item in items:
        if item.label and item.label not in classes:
            near = did_you_mean(item.label, classes)
            raise UserError(f"'{item.path}' has the label '{item.label}', which is none of the classes.{near}")
    if all_have_folders and where.is_dir() and any(item.label for item in items):
        for name in classes:
            if not (where / name).is_dir():
                raise UserError(f"the class '{name}' has no folder in '{where}': add it, or leave the class out.")


def _json_classes(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        # Pairs, and not a dict, in which the second of two equal names would replace the first.
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except OSError as error:
        raise UserError(f"the class file '{path}' cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"the class file '{path}' is no JSON ({error}).") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f"the class file '{path}' must hold class -> name, or class -> list of names.")
    rows = []
    for label, value in pairs:
        names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"the class '{label}' in '{path}' has no name: give it one, or a list.")
        rows.append((label, names))
    return rows


def _table(path: Path, what: str) -> list[Item]:
    if path.suffix not in TABLES:
        raise UserError(f"'{path}' is neither a {what} nor a table ({', '.join(sorted(TABLES))}) of them.")
    try:
        rows = _rows(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the table '{path}' cannot be read ({error}).") from None
    items = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.get("path"):
            raise UserError(f"row {number} of '{path}' has no 'path': the columns must be path and label.")
        found = path.parent / str(row["path"])
        if not found.exists():
            raise UserError(f"row {number} of '{path}' names '{found}', which does not exist.")
        items.append(Item(found, str(row.get("label") or "")))
    return items


def _rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
