"""The results of a finished study as a Markdown table: `python -m bench.results runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from altsight.study.compare import Cell, Column, Table, tabulate
from altsight.study.result import load_study

SHORT = {("knn", "top1"), ("linear", "top1"), ("retrieval", "image_to_text_r10")}
"""What the README shows."""


def cell(found: Cell) -> str:
    """Return one entry: per cent with its interval, the best method in bold."""
    if found.value is None or found.low is None or found.high is None:
        return "n/a"
    value = f"{100 * found.value:.1f}"
    if found.mark == "best":
        value = f"**{value}**"
    return f"{value} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def row(label: str, entries: list[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {label} | {' | '.join(entries)} |"


def markdown(table: Table, columns: list[Column]) -> str:
    """Return the table of `columns`."""
    lines = [row("arm", [str(c) for c in columns]), row("---", ["---"] * len(columns))]
    lines += [row(f"`{name}`", [cell(table.cells[name, c]) for c in columns]) for name in table.arms]
    for label, levels in (("chance", table.chance), ("commonest class", table.commonest)):
        lines.append(row(label, [f"{100 * levels[c]:.1f}" if c in levels else "" for c in columns]))
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Print the short table, all results, and what each arm cost."""
    study = load_study(folder)
    table = tabulate(study)
    print(markdown(table, [c for c in table.columns if (c.evaluator, c.metric) in SHORT]), end="\n\n")
    for task in dict.fromkeys(c.task for c in table.columns):
        print(markdown(table, [c for c in table.columns if c.task == task]), end="\n\n")
    print(row("arm", ["samples", "training FLOPs", "seconds", "peak memory, GB", "parameters trained"]))
    print(row("---", ["---"] * 5))
    for arm in study.arms:
        if (s := arm.summary) is not None:
            cost = [f"{s.samples_seen:,}", f"{s.flops:.3g}", f"{s.wall_seconds:.0f}", f"{s.peak_memory_gb:.2f}"]
            print(row(f"`{arm.name}`", [*cost, f"{s.parameters['trained']:,}"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
