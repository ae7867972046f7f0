"""Results of all arms side by side: means over seeds, intervals, and who wins each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from altsight.evals.base import Result
from altsight.evals.bootstrap import Interval, groups_of, hits_of, interval, paired_difference
from altsight.study.result import StudyResult
from altsight.study.wording import evaluator, metric

METERS = frozenset({"collapse"})
"""Evaluators that describe the features and name no winner."""

MAIN = frozenset({"top1", "image_to_text_r1", "text_to_image_r1"})
"""Metrics that the verdict and the console speak of; the report has all."""

Mark = Literal["", "best", "tied"]


@dataclass(frozen=True)
class Column:
    """One measure on one task."""

    task: str
    evaluator: str
    metric: str

    @property
    def measure(self) -> str:
        """Evaluator and metric in words."""
        return f"{evaluator(self.evaluator)} {metric(self.metric)}"

    def __str__(self) -> str:
        return f"{self.measure} on {self.task}"


@dataclass(frozen=True)
class Cell:
    """What one arm reached in one column.

    value: mean over seeds; None where it is not applicable, and `note` says why. low, high: 95 % interval over test
    items. seeds: the value under each seed. mark: best of the methods, or not separable from the best.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()
    n: int = 0
    note: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """Cells by (arm, column); chance, commonest: what blind guessing and the commonest class score, where known."""

    columns: tuple[Column, ...]
    arms: tuple[str, ...]
    cells: dict[tuple[str, Column], Cell]
    chance: dict[Column, float]
    commonest: dict[Column, float]

    @property
    def main(self) -> list[Column]:
        """The columns of main metrics, task by task."""
        return [column for column in self.columns if column.metric in MAIN]

    def best(self, column: Column) -> str:
        """Return the arm that is best in `column`; "" where fewer than two methods compete."""
        return next((arm for arm in self.arms if self.cells[arm, column].mark == "best"), "")

    def tied(self, column: Column) -> list[str]:
        """Return the methods that are not separable from the best one."""
        return [arm for arm in self.arms if self.cells[arm, column].mark == "tied"]


def tabulate(result: StudyResult, meters: bool = False) -> Table:
    """Return the table of `result`; `meters` asks for the collapse meters, otherwise they are left out."""
    rows = _rows(result)
    columns = [column for column in _columns(result) if (column.evaluator in METERS) == meters]
    cells, chance, commonest = {}, {}, {}
    for column in columns:
        found = {name: rows.get((name, column), []) for name in result.names}
        for name, values in found.items():
            cells[name, column] = _cell(values)
        for r in (r for values in found.values() for r in values if r.value is not None):
            if r.chance is not None:
                chance[column] = r.chance
            if "commonest" in r.extra and r.metric == "top1":
                commonest[column] = r.extra["commonest"]
        if not meters:
            _mark(cells, column, {name: found[name] for name in result.names if result.kind(name) == "method"})
    return Table(tuple(columns), tuple(result.names), cells, chance, commonest)


def clearly_better(result: StudyResult, a: str, b: str, column: Column) -> bool:
    """True if arm `a` is better than arm `b` in `column` beyond doubt (see `separable`)."""
    rows = _rows(result)
    return separable(rows[a, column], rows[b, column])


def difference(a: Sequence[Result], b: Sequence[Result]) -> Interval | None:
    """Return the mean difference a - b of two arms over their seeds, paired by test item; None without hits of both.

    The hits of an item are averaged over seeds first, so the interval speaks of the test items; see `separable` for
    the seeds.
    """
    if not (_paired(a) and _paired(b)) or a[0].data != b[0].data:
        return None
    return paired_difference(_mean_hits(a), _mean_hits(b), groups_of(a[0]))


def separable(a: Sequence[Result], b: Sequence[Result]) -> bool:
    """True if a is better than b beyond doubt: over the test items at 95 %, and under every seed that both have."""
    found = difference(a, b)
    clear = _low(a) > _high(b) if found is None else found.low > 0
    return clear and all(x > y for x, y in zip(_values(a), _values(b), strict=False))


def _columns(result: StudyResult) -> list[Column]:
    return list(dict.fromkeys(Column(r.task, r.evaluator, r.metric) for arm in result.arms for r in arm.results))


def _rows(result: StudyResult) -> dict[tuple[str, Column], list[Result]]:
    rows: dict[tuple[str, Column], list[Result]] = {}
    for arm in result.arms:
        for r in arm.results:
            rows.setdefault((arm.name, Column(r.task, r.evaluator, r.metric)), []).append(r)
    return rows


def _cell(results: Sequence[Result]) -> Cell:
    values = _values(results)
    if not values:
        note = results[0].note if results else "not evaluated"
        return Cell(None, note=note)
    if len(values) > 1 and _paired(results):
        found = interval(_mean_hits(results), groups_of(results[0]))
        return Cell(found.value, found.low, found.high, tuple(values), results[0].n, results[0].note)
    known = all(r.low is not None and r.high is not None for r in results)
    low, high = (_low(results), _high(results)) if known else (None, None)
    return Cell(float(np.mean(values)), low, high, tuple(values), results[0].n, results[0].note)


def _mark(cells: dict[tuple[str, Column], Cell], column: Column, methods: dict[str, list[Result]]) -> None:
    able = {name: results for name, results in methods.items() if _values(results)}
    if len(able) < 2:
        return
    best = max(able, key=lambda name: float(np.mean(_values(able[name]))))
    for name, results in able.items():
        mark: Mark = "best" if name == best else "" if separable(able[best], results) else "tied"
        cells[name, column] = Cell(**{**cells[name, column].__dict__, "mark": mark})


def _values(results: Sequence[Result]) -> list[float]:
    return [r.value for r in results if r.value is not None]


def _low(results: Sequence[Result]) -> float:
    return float(np.mean([r.value if r.low is None else r.low for r in results if r.value is not None]))


def _high(results: Sequence[Result]) -> float:
    return float(np.mean([r.value if r.high is None else r.high for r in results if r.value is not None]))


def _paired(results: Sequence[Result]) -> bool:
    return bool(results) and all("hits" in r.extra and r.data == results[0].data for r in results)


def _mean_hits(results: Sequence[Result]) -> npt.NDArray[np.float64]:
    return np.mean([hits_of(r) for r in results], axis=0, dtype=np.float64)
