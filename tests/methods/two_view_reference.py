"""What the tests of two-view methods share: a batch of views, and a slow head written from its definition."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.photometric import Photometric

Rows = list[list[float]]


def view_batch(**more: Tensor) -> Batch:
    """Three samples: image (two views of 32 x 32 pixels each) and colour; `more` are further fields."""
    pixels = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colour = torch.stack([torch.stack([Photometric().draw(key(0, i).child(v)) for v in "ab"]) for i in range(3)])
    return Batch({"image": pixels, "colour": colour, **more}, torch.arange(3), torch.arange(3))


def slow_head(head: Any, rows: Rows) -> Rows:
    """Return what an MLP head makes of `rows`, layer by layer and number by number; batch norm over these rows."""
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.tolist()
            bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
            rows = [
                [sum(a * b for a, b in zip(w, row, strict=True)) + c for w, c in zip(weight, bias, strict=True)]
                for row in rows
            ]
        elif isinstance(layer, nn.ReLU):
            rows = [[max(0.0, value) for value in row] for row in rows]
        else:
            scale = [1.0] * len(rows[0]) if layer.weight is None else layer.weight.tolist()
            shift = [0.0] * len(rows[0]) if layer.bias is None else layer.bias.tolist()
            columns = []
            for column, a, b in zip(zip(*rows, strict=True), scale, shift, strict=True):
                mean = sum(column) / len(column)
                variance = sum((value - mean) ** 2 for value in column) / len(column)
                columns.append([a * (value - mean) / math.sqrt(variance + 1e-5) + b for value in column])
            rows = [list(row) for row in zip(*columns, strict=True)]
    return rows


def slow_cosine(u: list[float], v: list[float]) -> float:
    """Cosine of two vectors."""
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def stir(parameters: Iterable[nn.Parameter], seed: int = 0) -> None:
    """Move every parameter a little: scales that are all 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def without_gradient(method: nn.Module) -> set[str]:
    """Return the names of the parameters that got no gradient."""
    return {name for name, p in method.named_parameters() if p.grad is None}
