"""Curves of the runs as plotly figures, each with two horizontal axes to choose from: samples and FLOPs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from altsight.study.result import UNTRAINED, StudyResult
from altsight.train.log import read_log

Line = Mapping[str, float]

PALETTE = ("#3a6fd8", "#d9622b", "#1f9d74", "#a855a8", "#b58a00", "#4aa3c7", "#c2405f", "#6f7d2c")
REFERENCE = "#8a8f98"
MAX_POINTS = 600
"""Points of one curve; longer logs are thinned evenly."""
LEAST_SPAN = 10.0
DASHES = ("solid", "dot", "dash", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


@dataclass(frozen=True)
class Log:
    """The log of one run."""

    arm: str
    seed: int
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Figure:
    """A plot: plotly's traces and layout, the x values under each axis, and what it shows in words."""

    title: str
    words: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    x: dict[str, list[list[float]]]

    def json(self) -> str:
        """Return what the page's script draws, safe inside a script element."""
        return json.dumps({"traces": self.traces, "layout": self.layout, "x": self.x}).replace("</", "<\\/")


def read_logs(result: StudyResult) -> list[Log]:
    """Return the logs of all arms, in the order of the report; the untrained encoder's holds its probe."""
    arms = [arm for name in result.names for arm in result.of(name)]
    return [Log(arm.name, arm.seed, tuple(read_log(result.path(arm)))) for arm in arms]


def colours(result: StudyResult) -> dict[str, str]:
    """Return the colour of every arm, the same in all figures; references are grey."""
    methods = [name for name in result.names if result.kind(name) == "method"]
    found = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    return {name: found.get(name, REFERENCE) for name in result.names}


def symbols(result: StudyResult) -> dict[str, str]:
    """Return the marker of every arm: another one for every round of the palette, so that no two arms look alike."""
    methods = [name for name in result.names if result.kind(name) == "method"]
    found = {name: SYMBOLS[i // len(PALETTE) % len(SYMBOLS)] for i, name in enumerate(methods)}
    return {name: found.get(name, SYMBOLS[0]) for name in result.names}


def loss_figures(result: StudyResult, logs: Sequence[Log]) -> list[Figure]:
    """Return one figure an arm: its losses differ from other arms' in kind, so they share no axis."""
    return [
        _loss_figure(name, logs, colours(result)[name])
        for name in dict.fromkeys(log.arm for log in logs)
        if name != UNTRAINED
    ]


def probe_figure(result: StudyResult, logs: Sequence[Log]) -> Figure | None:
    """Return the online probe of all arms in one figure; None where no probe was taken."""
    names = (name for log in logs for line in log.lines for name in line)
    metric = next((name for name in names if name.startswith("probe/")), "")
    if not metric:
        return None
    palette, marks = colours(result), symbols(result)
    start = {log.seed: [line for line in log.lines if metric in line] for log in logs if log.arm == UNTRAINED}
    traces, x = [], _axes()
    for log in (log for log in logs if log.arm != UNTRAINED):
        lines = [*start.get(log.seed, []), *(line for line in log.lines if metric in line)]
        traces.append(
            _trace(_label(result, log), [100 * line[metric] for line in lines], palette[log.arm])
            | {
                "mode": "lines+markers",
                "line": _stroke(palette[log.arm], log, result),
                "marker": {"color": palette[log.arm], "symbol": marks[log.arm]},
            }
        )
        _extend(x, lines)
    layout = _layout("per cent")
    layout["yaxis"]["range"] = _range([y for trace in traces for y in trace["y"]])
    task = result.plan.tasks[0].name
    words = f"Top-1 accuracy of k-NN on the validation split of {task}, taken while training"
    words += "; all curves start at the untrained encoder." if any(start.values()) else "."
    return Figure("Online probe", words, traces, layout, x)


def _loss_figure(name: str, logs: Sequence[Log], colour: str) -> Figure:
    traces, x = [], _axes()
    mine = [log for log in logs if log.arm == name]
    # What no student can fall below moves while a teacher's targets change: it would hide what is learned.
    floor = any("floor" in line for log in mine for line in log.lines)
    above = ", above its targets' entropy" if floor else ""
    for log in mine:
        lines = _thinned([line for line in log.lines if "loss" in line])
        parts = [key for key in (lines[0] if lines else {}) if key.startswith("loss/")]
        shown = ["loss", *parts] if len(parts) > 1 and not floor else ["loss"]
        for number, key in enumerate(shown):
            label = key.removeprefix("loss/") if number else "total"
            if len(mine) > 1:
                label += f", seed {log.seed}"
            trace = _trace(label, [line[key] - line.get("floor", 0.0) for line in lines], colour)
            trace["line"] = {"color": colour, "width": 1.8, "dash": DASHES[number % len(DASHES)]}
            trace["opacity"] = 1.0 if not number else 0.6
            traces.append(trace)
            _extend(x, lines)
    layout = _layout("loss") | {"showlegend": len(traces) > 1}
    return Figure(f"Loss of {name}{above}", f"Training loss of {name}{above}.", traces, layout, x)


def _trace(name: str, y: list[float], colour: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "y": [_short(v) for v in y], "marker": {"color": colour}}


def _stroke(colour: str, log: Log, result: StudyResult) -> dict[str, Any]:
    place = result.plan.seeds.index(log.seed)
    dash = "dash" if result.kind(log.arm) == "reference" else DASHES[place % len(DASHES)]
    return {"color": colour, "width": 2, "dash": dash}


def _label(result: StudyResult, log: Log) -> str:
    return log.arm if len(result.plan.seeds) == 1 else f"{log.arm}, seed {log.seed}"


def _layout(y_title: str) -> dict[str, Any]:
    return {"yaxis": {"title": {"text": y_title}}, "showlegend": True}


def _range(values: Sequence[float]) -> list[float]:
    """Return an axis for per cents that is at least LEAST_SPAN wide, so that noise does not look like progress."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    pad = max(LEAST_SPAN - (high - low), 0.1 * (high - low)) / 2
    return [max(low - pad, 0.0), min(high + pad, 100.0)]


def _axes() -> dict[str, list[list[float]]]:
    return {"samples": [], "flops": []}


def _extend(x: dict[str, list[list[float]]], lines: Sequence[Line]) -> None:
    for axis, values in x.items():
        values.append([line[axis] for line in lines])


def _thinned(lines: Sequence[Line]) -> list[Line]:
    stride = -(-len(lines) // MAX_POINTS) or 1
    # Counted from the end, so that the last value is always shown.
    return list(lines[::-1][::stride][::-1])


def _short(value: float) -> float:
    return float(f"{value:.5g}")
