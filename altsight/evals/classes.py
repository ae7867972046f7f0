"""Names of classes: which label stands for which words, and which classes a set has (specifications D1.3 and D8)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from altsight.core.errors import UserError

IMAGENET = "imagenet"
"""OpenAI's curated names of the 1,000 classes (they are not WordNet's lemmas)."""
SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
"""Name -> file of timm with the WordNet ids of the classes that occur in the set."""


def class_names(source: str, labels: Iterable[str]) -> dict[str, str]:
    """Return label -> name in the order of the class ids.

    Args:
        source: a JSON object {label: name}; a text file (or JSON list) with one name a line in the order of the
            labels; or "imagenet". The i-th line names the label i where labels are numbers, as ImageNet-V2's folders
            are; otherwise the i-th label in sorted order, as torchvision's ImageFolder has it.
        labels: those that occur in the data.

    Raises:
        UserError: the file is missing or malformed, holds a name twice, or does not name every label.
    """
    present = sorted(set(labels) - {""})
    if source == IMAGENET:
        return _imagenet(present)
    found = _read(source, "the names of classes")
    if isinstance(found, Mapping):
        names = {str(label): str(name).strip() for label, name in found.items()}
    else:
        names = _in_order([str(name).strip() for name in found], present, source)
    _check(names, source)
    return names


def subset(source: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of label -> name for the classes that `source` lists, in the order of `names`.

    Args:
        source: "imagenet-a", "imagenet-r", a text file with a label or name a line, a JSON list of them, or a JSON
            object whose keys they are (as ObjectNet's objectnet_to_imagenet_1k.json). Case, `_` and `-` do not matter.

    Raises:
        UserError: the file is missing, or lists what is no class.
    """
    listed = _synsets(SUBSETS[source]) if source in SUBSETS else [str(v) for v in _read(source, "a subset of classes")]
    wanted = {_plain(entry): entry for entry in listed}
    chosen = {label: name for label, name in names.items() if {_plain(label), _plain(name)} & wanted.keys()}
    known = {_plain(word) for pair in chosen.items() for word in pair}
    unknown = [entry for plain, entry in wanted.items() if plain not in known]
    if unknown:
        raise UserError(f"'{source}' lists '{unknown[0]}', which is the label or name of no class: mend the list.")
    return chosen


def words(label: str) -> str:
    """Return a label as words: 'animal-mammal' and 'animal_mammal' become 'animal mammal'."""
    return re.sub(r"[\s_\-/]+", " ", label).strip()


def check_named(names: Mapping[str, str], labels: Iterable[str], where: str) -> None:
    """Raise UserError if one of `labels` has no name; `where`: the file that should hold it."""
    missing = sorted(set(labels) - {""} - names.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"'{where}' has no name for the label '{missing[0]}'{more}: add it, or leave the folder out.")


def _in_order(names: Sequence[str], present: Sequence[str], source: str) -> dict[str, str]:
    if present and all(re.fullmatch(r"\d+", label) for label in present):
        # ImageFolder would sort these folders as text, 0 1 10 100 ..., and pair them with the wrong names.
        written = {int(label): label for label in present}
        return {written.get(i, str(i)): name for i, name in enumerate(names)}
    if len(names) != len(present):
        raise UserError(
            f"'{source}' holds {len(names):,} names for {len(present):,} labels: give one a line in the sorted order "
            "of the labels, or a JSON object {label: name}."
        )
    return dict(zip(present, names, strict=True))


def _imagenet(present: Sequence[str]) -> dict[str, str]:
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ModuleNotFoundError:
        raise UserError("the class names 'imagenet' need open_clip: `pip install 'altsight[openclip]'`.") from None
    names = [str(name) for name in IMAGENET_CLASSNAMES]
    if any(label.startswith("n") for label in present):
        return dict(zip(_synsets("imagenet_synsets.txt"), names, strict=True))
    return dict(zip(map(str, range(len(names))), names, strict=True))


def _synsets(file: str) -> list[str]:
    import timm.data

    return (Path(timm.data.__file__).parent / "_info" / file).read_text(encoding="utf-8").split()


def _read(source: str, what: str) -> Any:
    """Return the mapping or list in a JSON file, or the lines of any other."""
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"'{source}', the file with {what}, cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"'{source}', the file with {what}, is no UTF-8 text: save it as UTF-8.") from None
    if not source.endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"'{source}', the file with {what}, is no JSON ({error}): mend it.") from None
    if not isinstance(found, dict | list) or not found:
        raise UserError(f"'{source}', the file with {what}, must hold a JSON object or list.")
    return found


def _check(names: Mapping[str, str], source: str) -> None:
    seen: dict[str, str] = {}
    for label, name in names.items():
        if not name:
            raise UserError(f"'{source}' gives the label '{label}' an empty name: mend it.")
        other = seen.setdefault(name.casefold(), label)
        if other != label:
            raise UserError(
                f"'{source}' names two labels '{name}' ('{other}' and '{label}'): give each a name of its own."
            )


def _plain(text: str) -> str:
    return words(text).casefold()
