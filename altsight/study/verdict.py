"""The study's answer in one paragraph of plain words."""

from __future__ import annotations

from altsight.study.compare import Cell, Column, Table
from altsight.study.result import UNTRAINED, StudyResult
from altsight.study.wording import amount, flops, listed


def verdict(result: StudyResult, table: Table) -> list[str]:
    """Return the sentences: who wins which column, by how much, and what that is worth."""
    columns = table.main
    contested = [c for c in columns if table.best(c)]
    sentences = [_opening(result, table, contested), *(_winner(table, c) for c in contested)]
    sentences += _alone(result, table, columns)
    sentences += _against(result, table, columns)
    return [sentence for sentence in sentences if sentence]


def budget_words(result: StudyResult) -> str:
    """Return the budget of every arm in words."""
    budget = result.plan.budget
    if budget.kind == "samples":
        return f"{budget.samples:,} samples"
    return flops(budget.flops) if budget.kind == "flops" else f"{budget.minutes:g} minutes"


def _opening(result: StudyResult, table: Table, contested: list[Column]) -> str:
    methods = [name for name in table.arms if result.kind(name) == "method"]
    encoder = next((arm.summary.parameters["encoder"] for arm in result.arms if arm.summary), 0)
    trained = (
        f"{listed(methods)} trained the same encoder ({amount(encoder)} parameters) for {budget_words(result)} each"
    )
    if not contested:
        return f"{trained}; no measure compares two of them."
    wins = {name: [c for c in contested if table.best(c) == name] for name in methods}
    clear = {name: sum(not table.tied(c) for c in columns) for name, columns in wins.items()}
    ranked = sorted((name for name in methods if wins[name]), key=lambda name: -len(wins[name]))
    parts = [
        f"{name} is best in {len(wins[name])} of {len(contested)} comparisons, {_share(clear[name], len(wins[name]))}"
        for name in ranked
    ]
    return f"{trained}: {listed(parts)}."


def _share(clear: int, wins: int) -> str:
    if not clear:
        return "never beyond doubt"
    return "beyond doubt at 95 %" if clear == wins else f"{clear} of them beyond doubt at 95 %"


def _winner(table: Table, column: Column) -> str:
    best = table.best(column)
    text = f"{column}: {best} {_value(table.cells[best, column])}"
    tied = table.tied(column)
    if tied:
        others = listed([f"{name} {_value(table.cells[name, column])}" for name in tied])
        return f"{text}, not separable at 95 % from {others}."
    return f"{text}."


def _alone(result: StudyResult, table: Table, columns: list[Column]) -> list[str]:
    """Say which columns only one method can enter, and which none."""
    by_able: dict[tuple[str, ...], list[str]] = {}
    for column in columns:
        able = tuple(
            name for name in table.arms if result.kind(name) == "method" and table.cells[name, column].value is not None
        )
        if len(able) < 2:
            by_able.setdefault(able, []).append(str(column))
    return [
        f"Only {able[0]} can be measured by {listed(names)}."
        if able
        else f"No method can be measured by {listed(names)}."
        for able, names in by_able.items()
    ]


def _against(result: StudyResult, table: Table, columns: list[Column]) -> list[str]:
    """Compare the methods with the untrained encoder and with the references."""
    sentences = []
    if UNTRAINED in table.arms:
        methods = [name for name in table.arms if result.kind(name) == "method"]
        below = {name: [str(c) for c in columns if _beats(table, UNTRAINED, name, c)] for name in methods}
        failed = [f"{name} in {listed(names)}" for name, names in below.items() if names]
        if failed:
            sentences.append(f"The untrained encoder is at least as good as {'; as '.join(failed)}.")
        else:
            sentences.append("Every method is better than the untrained encoder in every comparison.")
    for name in (n for n in table.arms if result.kind(n) == "reference"):
        reached = [f"{_value(table.cells[name, c])} in {c}" for c in columns if table.cells[name, c].value is not None]
        if reached:
            sentences.append(f"For reference, {name} reaches {listed(reached)}.")
    return sentences


def _beats(table: Table, a: str, b: str, column: Column) -> bool:
    x, y = table.cells[a, column].value, table.cells[b, column].value
    return x is not None and y is not None and x >= y


def _value(cell: Cell) -> str:
    text = f"{100 * (cell.value or 0.0):.1f} %"
    if cell.low is not None and cell.high is not None:
        text += f" ({100 * cell.low:.1f} to {100 * cell.high:.1f})"
    return text
