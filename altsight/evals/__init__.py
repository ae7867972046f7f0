"""Evaluators over a `View`: found by name in `EVALUATORS`, imported when first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from altsight.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from altsight.evals.base import Evaluator, Result, Task, View

EVALUATORS = {
    "knn": "altsight.evals.knn:knn",
    "linear": "altsight.evals.linear:linear",
    "zeroshot": "altsight.evals.zeroshot:zeroshot",
    "retrieval": "altsight.evals.retrieval:retrieval",
    "collapse": "altsight.evals.collapse:collapse",
    "compositional": "altsight.evals.compositional:compositional",
    "rated": "altsight.evals.rated:rated",
    "robustness": "altsight.evals.robustness:robustness",
    "corruptions": "altsight.evals.corrupted:corruptions",
    "fewshot": "altsight.evals.fewshot:fewshot",
    "captions": "altsight.evals.captions:captions",
}
STANDARD = ("knn", "linear", "zeroshot", "retrieval", "collapse")
"""What runs where nothing is named: minutes at most, whatever the task. The others are named by who wants them."""


def find(name: str) -> Evaluator:
    """Return the evaluator `name`.

    Raises:
        UserError: there is no such evaluator.
    """
    if name not in EVALUATORS:
        raise UserError(f"there is no evaluator '{name}'.{did_you_mean(name, EVALUATORS)}")
    module, _, function = EVALUATORS[name].partition(":")
    found: Evaluator = getattr(import_module(module), function)
    return found


def evaluate(
    view: View,
    tasks: Sequence[Task],
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Result]:
    """Return the results of the evaluators `names` (the standard ones if None) on every task.

    Features are extracted once and shared through `view.cache`; every rank must call it and gets the same results.
    `progress` is called with "task: evaluator" before each step.

    Raises:
        UserError: an unknown evaluator, or data or features that cannot be used.
    """
    evaluators = {name: find(name) for name in (STANDARD if names is None else names)}
    results: list[Result] = []
    for task in tasks:
        for name, evaluator in evaluators.items():
            progress(f"{task.name}: {name}")
            results += evaluator(view, task)
    return results + (_suite(results) if "fewshot" in evaluators else [])


def _suite(results: Sequence[Result]) -> list[Result]:
    """Return the means over the tasks of a suite."""
    from altsight.evals.fewshot import suite

    return list(suite(results))
