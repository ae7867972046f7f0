"""The result table in the terminal: one table a task, arms in rows, the winner in bold."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from altsight.study.compare import Cell, Column, Table, tabulate
from altsight.study.result import StudyResult
from altsight.study.wording import evaluator, metric

NARROW = 108
"""Below this many columns an interval goes under its value."""


def print_table(result: StudyResult, console: Console) -> None:
    """Print the main metrics of every task, with 95 % intervals and the chance level."""
    table = tabulate(result)
    for task in dict.fromkeys(column.task for column in table.main):
        console.print()
        columns = [column for column in table.main if column.task == task]
        console.print(_rich(result, table, task, columns, narrow=console.width < NARROW))
    console.print(
        "[bold]*[/] best method   = not separable from the best at 95 %   (95 % intervals over test items"
        + (", means over seeds)" if len(result.plan.seeds) > 1 else ")"),
        style="dim",
    )


def _rich(result: StudyResult, table: Table, task: str, columns: list[Column], narrow: bool) -> RichTable:
    shown = RichTable(
        title=f"{task} (per cent)", title_justify="left", title_style="bold", box=box.SIMPLE, padding=0, show_edge=False
    )
    shown.add_column("arm", no_wrap=True)
    for column in columns:
        shown.add_column(
            f"{evaluator(column.evaluator)}\n{_arrow(metric(column.metric), narrow)}",
            justify="right",
            no_wrap=True,
        )
    for name in table.arms:
        kind = result.kind(name)
        label = f"{name}, ref." if kind == "reference" else name
        cells = [_cell(table.cells[name, column], narrow) for column in columns]
        shown.add_row(Text(label, style="" if kind == "method" else "dim"), *cells)
    shown.add_section()
    for label, levels in (("chance", table.chance), ("commonest class", table.commonest)):
        shown.add_row(label, *(f"{100 * levels[c]:.1f}" if c in levels else "" for c in columns), style="dim")
    return shown


def _arrow(name: str, narrow: bool) -> str:
    """Return 'image to text R@1' as 'image→text R@1', or 'i→t R@1' where columns are short of room."""
    short = name.replace("image to text", "i→t").replace("text to image", "t→i") if narrow else name
    return short.replace(" to ", "→")


def _cell(cell: Cell, narrow: bool) -> Text:
    if cell.value is None:
        return Text("n/a", style="dim")
    text = {"best": "*", "tied": "=", "": ""}[cell.mark] + f"{100 * cell.value:.1f}"
    if cell.low is not None and cell.high is not None:
        bounds = f"{100 * cell.low:.1f}-{100 * cell.high:.1f}"
        text += f"\n{bounds}" if narrow else f" ({bounds})"
    return Text(text, style="bold" if cell.mark == "best" else "")
