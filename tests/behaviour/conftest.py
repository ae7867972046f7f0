"""What tests of behaviour share: made-up data, a task on them, and probes of frozen features."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from altsight.data.prepared import Prepared
from altsight.data.shapes import Shapes
from altsight.data.sources import Pairs
from altsight.data.text import train_tokenizer
from altsight.evals import evaluate
from altsight.evals.base import Result, Split, Task, View


def prepared_shapes(folder: Path, size: int, seed: int = 0) -> Prepared:
    """Return `size` training samples with a tokenizer; nothing is written, `folder` is named in messages only."""
    source = Shapes(size, seed)
    captions = (text for i in range(min(size, 500)) for text in source.texts(i))
    return Prepared(folder, source, train_tokenizer(captions, 512), {}, f"shapes-{seed}-{size}")


def shapes_task(train: int = 1000, val: int = 300, test: int = 600, label: str = "label") -> Task:
    """Return a task on samples that no training has seen (their seeds are 1,000 and up)."""
    sizes = {"train": train, "val": val, "test": test}
    splits = [
        # What an evaluation asks of pairs is what Shapes has.
        Split(name, cast(Pairs, Shapes(size, 1000 + number)))
        for number, (name, size) in enumerate(sizes.items())
    ]
    return Task("shapes", *splits, label=label, prompts=("a picture of a {}",))


def probe(view: View, task: Task, label: str = "label", evaluator: str = "linear") -> Result:
    """Return the accuracy of a "linear" or "knn" probe for a field ("label", "shape", "colour", "size" or "side").

    `value` lies in [0, 1]; `low` and `high` bound its 95 % interval, `chance` is that of guessing.
    """
    fields: dict[str, Any] = {"label": label, "name": f"{task.name} {label}"}
    (result,) = evaluate(view, [dataclasses.replace(task, **fields)], [evaluator])
    assert result.value is not None and result.low is not None and result.chance is not None
    return result
