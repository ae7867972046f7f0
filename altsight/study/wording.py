"""Numbers and lists as the report and the console print them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_FLOPS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_EVALUATORS = {"knn": "k-NN", "linear": "linear probe", "zeroshot": "zero-shot"}
FEW = 6
"""So many arms are named one by one; of more it is told what they have in common."""


def evaluator(name: str) -> str:
    """Return the evaluator's name as people write it: zero-shot."""
    return _EVALUATORS.get(name, name)


def metric(name: str) -> str:
    """Return the metric's name as people write it: top-1, image to text R@1."""
    named = re.sub(r"\btop(\d+)$", r"top-\1", re.sub(r"_r(\d+)$", r" R@\1", name))
    return named.replace("_", " ")


def flops(x: float) -> str:
    """Return 3 significant digits with a unit: 1.23 PFLOPs."""
    for unit, name in _FLOPS:
        if x >= unit:
            return f"{_three(x / unit)} {name}"
    return f"{x:,.0f} FLOPs"


def amount(n: float) -> str:
    """Return a large count in short: 85.8 M."""
    for unit, name in _COUNTS:
        if n >= unit:
            return f"{_three(n / unit)} {name}"
    return f"{n:,.0f}"


def duration(seconds: float) -> str:
    """Return a time span: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def listed(words: Sequence[str]) -> str:
    """Return 'a', 'a and b', 'a, b and c'."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def setting(value: Any) -> str:
    """Return a configuration value as a person would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(setting(v) for v in value) + ")"
    if value is None or value == "":
        return "none"
    return str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as {"optim.lr": 0.1, ...}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _three(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"
