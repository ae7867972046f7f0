"""Compositional pairs: which caption belongs to which image, of those that look or read alike (specification D10)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.decode import BrokenImage
from altsight.evals.base import Contest, Result, Task, View, not_applicable
from altsight.evals.bootstrap import class_interval, scored
from altsight.evals.features import content_hash, finite

IMAGE_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Of Winoground's scores. Group: of the 24 orders of the four similarities, 4 have both matches above both others."""


def compositional(view: View, task: Task) -> Iterator[Result]:
    """Yield Winoground's text, image and group scores, or SugarCrepe's accuracy of every subset and their mean.

    Text score: each image is more similar to its own caption than to the other; image score: each caption to its own
    image; group: both. With one image, a hit is the right caption above the wrong one. A tie is a miss.
    """
    pairs = [contest for contest in task.contests if len(contest.images) == 2]
    single = [contest for contest in task.contests if len(contest.images) == 1]
    if not view.is_dual:
        for metric in (*(CHANCE if pairs else ()), *(("mean_subset",) if single else ())):
            yield not_applicable(view, task, "compositional", metric)
        return
    if pairs:
        yield from _pairs(view, task, _similarities(view, pairs))
    if single:
        yield from _subsets(view, task, single, _similarities(view, single))


def hits(similarities: Tensor) -> dict[str, Tensor]:
    """Return Winoground's scores, bool (n,) each, of cosines (n, image, caption)."""
    own = similarities.diagonal(dim1=1, dim2=2)
    other_text = similarities.flip(2).diagonal(dim1=1, dim2=2)
    other_image = similarities.flip(1).diagonal(dim1=1, dim2=2)
    text, image = (own > other_text).all(dim=1), (own > other_image).all(dim=1)
    return {"text": text, "image": image, "group": text & image}


def read_winoground(folder: str) -> tuple[Contest, ...]:
    """Return the contests of a folder with examples.jsonl (id, image_0, image_1, caption_0, caption_1) and images/.

    Raises:
        UserError: a file is missing, or a line has not these fields.
    """
    path = Path(folder) / "examples.jsonl"
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            row = _row(line, path, number, ("image_0", "image_1", "caption_0", "caption_1"))
            images = tuple(_image(Path(folder) / "images", name, path) for name in row[:2])
            found.append(Contest(images, row[2:]))
    return tuple(found)


def read_sugarcrepe(folder: str, images: str) -> tuple[Contest, ...]:
    """Return the contests of a folder of JSON files {id: {filename, caption, negative_caption}}, one for each subset.

    images: the folder of COCO's val2017.

    Raises:
        UserError: a file is missing or malformed.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise UserError(f"'{folder}' holds no JSON file: give the folder with SugarCrepe's swap_obj.json and the like.")
    found = []
    for path in files:
        try:
            rows = json.loads(_text(path)).values()
            wanted = [_texts(row, ("filename", "caption", "negative_caption")) for row in rows]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise UserError(
                f"'{path}' is no subset of SugarCrepe, which is {{id: {{filename, caption, negative_caption}}}}."
            ) from None
        for file, caption, negative in wanted:
            found.append(Contest((_image(Path(images), file, path),), (caption, negative), path.stem))
    return tuple(found)


@dataclass(frozen=True)
class _Compared:
    """Cosines (n, images, captions) of contests, and a hash of their images and captions."""

    cosines: Tensor
    data: str


def _similarities(view: View, contests: Sequence[Contest]) -> _Compared:
    paths = list(dict.fromkeys(path for contest in contests for path in contest.images))
    texts = list(dict.fromkeys(text for contest in contests for text in contest.captions))
    try:
        images = finite(view.encode_image(paths), view)
    except BrokenImage as error:
        raise UserError(
            f"an image of the contests cannot be decoded ({error}): mend it, or leave the pair out."
        ) from None
    captions = finite(view.encode_text(texts), view)
    of_path, of_text = ({name: i for i, name in enumerate(names)} for names in (paths, texts))
    rows = torch.tensor([[of_path[path] for path in contest.images] for contest in contests])
    columns = torch.tensor([[of_text[text] for text in contest.captions] for contest in contests])
    digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
    data = content_hash([[digests[path] for path in c.images], list(c.captions), c.group] for c in contests)
    return _Compared(images[rows] @ captions[columns].transpose(1, 2), data)


def _pairs(view: View, task: Task, found: _Compared) -> Iterator[Result]:
    for metric, correct in hits(found.cosines).items():
        yield scored(view, correct, metric=metric, chance=CHANCE[metric], **_fields(view, task, found))


def _subsets(view: View, task: Task, contests: Sequence[Contest], found: _Compared) -> Iterator[Result]:
    correct = (found.cosines[:, 0, 0] > found.cosines[:, 0, 1]).numpy()
    groups = np.array([contest.group for contest in contests])
    for group in dict.fromkeys(groups.tolist()):
        mine = correct[groups == group]
        yield scored(view, mine, metric=f"accuracy_{group}", chance=0.5, **_fields(view, task, found))
    mean = class_interval(correct, groups)
    yield Result(
        metric="mean_subset",
        value=mean.value,
        low=mean.low,
        high=mean.high,
        chance=0.5,
        n=len(correct),
        preprocess=view.preprocess.hash(),
        **_fields(view, task, found, seed=0),
    )


def _fields(view: View, task: Task, found: _Compared, **extra: Any) -> dict[str, Any]:
    return {
        "task": task.name,
        "evaluator": "compositional",
        "split": task.test.name,
        "feature_point": f"{view.feature_point}, projected",
        "data": found.data,
        "extra": {"preprocess": view.preprocess.words(), **extra},
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): see docs/evaluation.md for its layout.") from None
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is no UTF-8 text: save it as UTF-8.") from None


def _row(line: str, path: Path, number: int, fields: Sequence[str]) -> tuple[str, ...]:
    try:
        return _texts(json.loads(line), fields)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"line {number} of '{path}' must be a JSON object with {', '.join(fields)} as text.") from None


def _texts(row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """Return the texts in `fields`; KeyError or TypeError where there is none."""
    found = tuple(row[field] for field in fields)
    if not all(isinstance(text, str) for text in found):
        raise TypeError("a text is due")
    return found


def _image(folder: Path, name: str, where: Path) -> str:
    """Return the path of the image `name`, with or without its suffix."""
    for suffix in IMAGE_SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    raise UserError(f"'{where}' names the image '{name}', which is not in '{folder}'.")
