"""A model that sees loses accuracy step by step under corruptions, and binds words to what they name (the toy CLIP)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from altsight.data.prepare import read_pairs
from altsight.data.shapes import CLASSES, COLOURS, SHAPES, Shapes
from altsight.evals.base import Result, Split, Task, no_split
from altsight.evals.compositional import compositional, read_sugarcrepe
from altsight.evals.corrupted import corruptions
from altsight.evals.robustness import robustness
from altsight.evals.zeroshot import zeroshot
from tests.toy import PROMPT, toy_clip

pytestmark = pytest.mark.slow


def pictures(folder: Path, size: int, seed: int) -> Split:
    """Write pictures that the toy has not seen to a folder, with a table of what they show."""
    source, rows = Shapes(size, seed), list[dict[str, Any]]()
    for i in range(size):
        (folder / f"{i}.png").write_bytes(source.image(i))
        rows.append({"path": f"{i}.png", **source.fields(i)})
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return Split("test", read_pairs(str(folder / "table.jsonl"), ()))


def task(test: Split, **fields: Any) -> Task:
    return Task("shapes", no_split("train"), no_split("val"), test, "label", (PROMPT,), **fields)


def by_metric(results: list[Result]) -> dict[str, Result]:
    for r in results:
        print(f"{r.task} {r.metric}: {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]")
    return {r.metric: r for r in results}


def test_errors_grow_with_the_severity(tmp_path: Path) -> None:
    results = by_metric(list(corruptions(toy_clip(), task(pictures(tmp_path, 48, 1003)))))
    of_severity = np.mean([r.extra["severities"] for r in results.values() if "severities" in r.extra], axis=0)
    print("mean error at severities 1 to 5:", np.round(of_severity, 3), "clean:", results["clean_error"].value)
    assert results["mean_error"].low > results["clean_error"].value
    assert of_severity[4] > of_severity[0] and results["mean_error"].value < results["mean_error"].chance


def test_a_mask_of_the_classes_makes_the_question_easier(tmp_path: Path) -> None:
    test = pictures(tmp_path, 600, 1004)
    of_all = by_metric(list(zeroshot(toy_clip(), task(test))))
    squares = {name: name for name in CLASSES if name.endswith("square")}
    masked = by_metric(list(zeroshot(toy_clip(), task(test, classes=squares))))
    assert masked["top1"].low > of_all["top1"].high and masked["top1"].chance == pytest.approx(1 / len(squares))
    shifted = replace(task(test, classes=squares), clean=task(test))
    drop = by_metric(list(robustness(toy_clip(), shifted)))
    assert drop["drop"].value == 0 and drop["clean_top1"].n == drop["top1"].n, "one set under two names"


def test_words_are_bound_to_what_they_name(tmp_path: Path) -> None:
    source, folder = Shapes(300, 1005), tmp_path / "sugarcrepe"
    pictures(tmp_path, 300, 1005)
    folder.mkdir()
    swaps: dict[str, dict[str, Any]] = {"replace_colour": {}, "replace_shape": {}}
    for i in range(300):
        fields = source.fields(i)
        other = {
            "replace_colour": (next(c for c in sorted(COLOURS) if c != fields["colour"]), fields["shape"]),
            "replace_shape": (fields["colour"], next(s for s in SHAPES if s != fields["shape"])),
        }
        for name, (colour, shape) in other.items():
            negative = PROMPT.format(f"{colour} {shape}")
            row = {"filename": f"{i}.png", "caption": PROMPT.format(fields["label"]), "negative_caption": negative}
            swaps[name][str(i)] = row
    for name, rows in swaps.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    contests = read_sugarcrepe(str(folder), str(tmp_path))
    results = by_metric(list(compositional(toy_clip(), replace(task(no_split("test")), contests=contests))))
    assert all(r.low > 0.5 for r in results.values())
