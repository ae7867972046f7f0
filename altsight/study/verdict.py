"""The study's answer in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from altsight.study.compare import Cell, Column, Table, clearly_better
from altsight.study.result import UNTRAINED, StudyResult
from altsight.study.wording import FEW, amount, flops, listed


@dataclass(frozen=True)
class Verdict:
    """summary: one paragraph. columns: the winner of each comparison, a sentence each."""

    summary: str
    columns: tuple[str, ...]


def verdict(result: StudyResult, table: Table) -> Verdict:
    """Return who is best, in which comparison, and what that is worth."""
    contested = [column for column in table.main if table.best(column)]
    sentences = [
        _trained(result),
        _winners(table, contested),
        *_alone(result, table),
        _against_untrained(result, table),
        _against_commonest(result, table),
    ]
    return Verdict(" ".join(s for s in sentences if s), tuple(_winner(table, column) for column in contested))


def budget_words(result: StudyResult) -> str:
    """Return the budget of every arm in words."""
    budget = result.plan.budget
    if budget.kind == "samples":
        return f"{budget.samples:,} samples"
    return flops(budget.flops) if budget.kind == "flops" else f"{budget.minutes:g} minutes"


def who(result: StudyResult) -> str:
    """Return the methods' names, or how many they are."""
    methods = result.plan.methods
    return listed(methods) if len(methods) <= FEW else f"{len(methods)} methods"


def _trained(result: StudyResult) -> str:
    encoder = next((arm.summary.parameters["encoder"] for arm in result.arms if arm.summary), 0)
    return f"{who(result)} trained the same encoder ({amount(encoder)} parameters) for {budget_words(result)} each."


def _winners(table: Table, contested: list[Column]) -> str:
    if not contested:
        return "No measure compares two methods."
    clear = {name: 0 for name in table.arms}
    for column in contested:
        if not table.tied(column):
            clear[table.best(column)] += 1
    total, decided = len(contested), sum(clear.values())
    if not decided:
        return (
            f"No method is clearly the best: in none of the {total} comparisons can the leader be separated from all "
            "others at 95 %."
        )
    ranked = sorted((name for name in clear if clear[name]), key=lambda name: -clear[name])
    parts = [f"{name} in {clear[name]}" for name in ranked]
    text = f"Of {total} comparisons, the clearly best method is {listed(parts)}"
    return f"{text}; in {total - decided} the leader cannot be separated at 95 %." if decided < total else f"{text}."


def _winner(table: Table, column: Column) -> str:
    best = table.best(column)
    text = f"{column}: {best} {_value(table.cells[best, column])}"
    tied = sorted(table.tied(column), key=lambda name: -(table.cells[name, column].value or 0.0))
    if not tied:
        return f"{text}."
    named = tied if len(tied) <= FEW else tied[: FEW // 2]
    words = [f"{name} {_value(table.cells[name, column])}" for name in named]
    if len(named) < len(tied):
        words.append(f"{len(tied) - len(named)} more")
    return f"{text}, not separable at 95 % from {listed(words)}."


def _alone(result: StudyResult, table: Table) -> list[str]:
    """Say which comparisons only one method can enter, and which none."""
    by_able: dict[tuple[str, ...], list[Column]] = {}
    for column in table.main:
        able = tuple(name for name in result.plan.methods if table.cells[name, column].value is not None)
        if len(able) < 2:
            by_able.setdefault(able, []).append(column)
    return [
        f"Only {able[0]} can be measured by {_measures(columns)}."
        if able
        else f"No method can be measured by {_measures(columns)}."
        for able, columns in by_able.items()
    ]


def _against_untrained(result: StudyResult, table: Table) -> str:
    if UNTRAINED not in table.arms:
        return ""
    columns = [column for column in table.main if table.cells[UNTRAINED, column].value is not None]
    failed = {
        name: [column for column in columns if not clearly_better(result, name, UNTRAINED, column)]
        for name in result.plan.methods
    }
    if not any(failed.values()):
        return "Every method is clearly better than the untrained encoder."
    if all(len(missed) == len(columns) for missed in failed.values()):
        return (
            "No method is clearly better than the untrained encoder in any comparison; it takes a larger budget or "
            "harder tasks to tell them apart."
        )
    if len(failed) > FEW:
        return _better_by_column(columns, failed)
    parts = [f"{name} ({listed([str(c) for c in missed])})" for name, missed in failed.items() if missed]
    return f"Not clearly better than the untrained encoder: {listed(parts)}."


def _better_by_column(columns: list[Column], failed: dict[str, list[Column]]) -> str:
    """Name for each comparison the methods that are clearly better than the untrained encoder: they are the fewer."""
    parts = []
    for column in columns:
        better = [name for name, missed in failed.items() if column not in missed]
        names = listed(better) if len(better) <= FEW else f"{len(better)} of {len(failed)} methods"
        parts.append(f"{names or 'no method'} in {column}")
    return f"Clearly better than the untrained encoder: {'; '.join(parts)}."


def _against_commonest(result: StudyResult, table: Table) -> str:
    """Name the comparisons in which no method is above always answering the commonest class."""
    below = []
    for column in (column for column in table.main if column in table.commonest):
        cells = [table.cells[name, column] for name in result.plan.methods]
        reached = [cell.value if cell.low is None else cell.low for cell in cells if cell.value is not None]
        if all(low <= table.commonest[column] for low in reached):
            below.append(f"{column} ({100 * table.commonest[column]:.1f} %)")
    return f"No method is clearly above always answering the commonest class in {listed(below)}." if below else ""


def _measures(columns: list[Column]) -> str:
    return listed(list(dict.fromkeys(column.measure for column in columns)))


def _value(cell: Cell) -> str:
    text = f"{100 * (cell.value or 0.0):.1f} %"
    if cell.low is not None and cell.high is not None:
        text += f" ({100 * cell.low:.1f} to {100 * cell.high:.1f})"
    return text
