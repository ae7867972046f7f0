"""The model card of an export: where the weights are from, what they reached, how to use them, how that was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altsight
from altsight.core.config import read_json
from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.hub.model import Found
from altsight.hub.parity import LIMIT

READ_AT = {
    "cls": "the class token after the last norm",
    "mean": "the mean of the patch tokens after the last norm",
    "pooled": "what the backbone's own pooling yields",
    "cls_prenorm": "the class token before the last norm",
    "mean_prenorm": "the mean of the patch tokens before the last norm",
}


@dataclass(frozen=True)
class Origin:
    """Where weights come from: a sentence, facts by name, the recipe as JSON if there is one, and results."""

    sentence: str
    facts: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    results: tuple[dict[str, Any], ...] = ()


def of_run(directory: Path, results: Path | None = None) -> Origin:
    """Return the origin of a run's weights, from its run.json and summary.json.

    Args:
        results: a file that `altsight eval --out` or a study wrote.

    Raises:
        UserError: a file is damaged, or `results` does not exist.
    """
    run: dict[str, Any] = read_json(directory / "run.json")
    facts = {"method": run["name"], "data": run["data"]["path"]}
    if (directory / "summary.json").exists():
        summary = read_json(directory / "summary.json")
        facts |= {
            "data hash": summary["data"],
            "samples seen": f"{summary['samples_seen']:,}",
            "steps": f"{summary['steps']:,}",
            "precision": summary["precision"],
            "FLOPs": f"{summary['flops']:.3g}",
        }
    numbers = of_results(results, str(directory)) if results else ()
    sentence = f"Pre-trained with Altsight's method `{run['name']}`."
    return Origin(sentence, facts, json.dumps(run, indent=1), numbers)


def of_weights(found: Found, source: str, results: Path | None = None) -> Origin:
    """Return the origin of weights that were read from elsewhere."""
    facts = {"read from": source}
    if found.left_over:
        facts["left aside"] = f"{len(found.left_over)} tensors ({', '.join(found.left_over[:3])} ...)"
    numbers = of_results(results, source) if results else ()
    return Origin(f"Recognised as {found.recognised}.", facts, results=numbers)


def of_results(path: Path, source: str) -> tuple[dict[str, Any], ...]:
    """Return the results of the weights at `source` in a file of `altsight eval` or of a study.

    Raises:
        UserError: it does not exist, or holds none, or those of several other weights.
    """
    content: Any = read_json(path)
    by_weights = content if isinstance(content, dict) else {}
    if len(by_weights) > 1:
        by_weights = {name: rows for name, rows in by_weights.items() if Path(name) == Path(source)}
        if not by_weights:
            raise UserError(f"'{path}' holds results of {', '.join(content)}, and none of '{source}': give its own.")
    rows = [row for part in by_weights.values() if isinstance(part, list) for row in part]
    if not rows or not all(isinstance(row, dict) and "metric" in row and _is_value(row.get("value")) for row in rows):
        raise UserError(f"'{path}' holds no results: give a file that `altsight eval --out` wrote.")
    return tuple(row for row in rows if row.get("value") is not None)


def _is_value(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def card(view: View, origin: Origin, library: str, code: str, differences: Mapping[str, float]) -> str:
    """Return the model card in Markdown.

    Args:
        library: that loads the export.
        code: Python that uses it.
        differences: the largest ones between the library's numbers and Altsight's.
    """
    config, preprocess = view.encoder.config, view.preprocess
    parameters = sum(p.numel() for p in view.encoder.parameters())
    facts = origin.facts | {
        "backbone": f"{config.model}, {parameters / 1e6:.2f} M parameters",
        "images": preprocess.words(),
        "features": f"{READ_AT[view.feature_point]}, {view.encoder.width} wide",
        "text": _text(view, differences),
    }
    parts = [
        f"---\ntags: [altsight, image-feature-extraction]\nlibrary_name: {library}\n---",
        f"# {view.name}",
        f"{origin.sentence} Written by Altsight {altsight.__version__} for {library}.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        f"## Use\n\n```python\n{code.strip()}\n```",
        _checked(library, differences),
        _numbers(origin.results),
        f"## Recipe\n\n```json\n{origin.recipe}\n```" if origin.recipe else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(view: View, differences: Mapping[str, float]) -> str:
    if not view.is_dual:
        return "none"
    # What is in an export has been compared.
    return "a text tower in the same space" if "text vectors" in differences else "left behind, with its projections"


def _checked(library: str, differences: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {what} | {difference:.2g} |" for what, difference in differences.items())
    return (
        f"## Check\n\nLoaded back with {library} and compared on the same inputs in fp32; at most {LIMIT:g} is allowed."
        f"\n\n| | largest difference |\n|---|---|\n{rows}"
    )


def _numbers(results: tuple[dict[str, Any], ...]) -> str:
    if not results:
        return "## Numbers\n\nNone were recorded for these weights."
    head = "| task | split | evaluator | metric | value | 95 % interval | n |\n|---|---|---|---|---|---|---|\n"
    return "## Numbers\n\n" + head + "\n".join(_row(result) for result in results)


def _row(result: Mapping[str, Any]) -> str:
    low, high = result.get("low"), result.get("high")
    interval = f"[{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
    named = [str(result.get(name, "")) for name in ("task", "split", "evaluator", "metric")]
    return "| " + " | ".join([*named, f"{result['value']:.4g}", interval, str(result.get("n", ""))]) + " |"
