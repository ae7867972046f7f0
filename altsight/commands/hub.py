"""`load` and `export`: what weights are, and weights in the formats of other libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from altsight.evals.base import View
from altsight.hub.export import export as export_weights
from altsight.hub.load import describe
from altsight.train.log import console

SHOWN = 8
"""Names that are printed of those that were left over."""


@dataclass(frozen=True)
class Load:
    """Say what weights are recognised as: encoder, preprocessing, where features are read, what is left over."""

    weights: tyro.conf.Positional[str]
    """The folder of a run; a file or folder of timm, OpenCLIP, Hugging Face or a method's authors; timm:NAME,
    timm:NAME=FILE, open_clip:MODEL/PRETRAINED or hf:ORG/NAME."""
    img_size: int = 0
    """Side of the images in pixels; position tables are resampled. 0: that of the weights."""
    json: bool = False
    """Print it as JSON, and nothing else on standard output."""


def load(argv: Sequence[str]) -> int:
    """`altsight load WEIGHTS`."""
    options = tyro.cli(Load, args=argv, prog="altsight load")
    view, found = describe(options.weights, options.img_size)
    facts = {"recognised as": found.recognised} | _facts(view)
    if options.json:
        names = {"left_over": found.left_over, "missing": found.missing}
        print(json.dumps({name.replace(" ", "_"): value for name, value in facts.items()} | names, indent=1))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    for title, left in (("left over", found.left_over), ("missing", found.missing)):
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        table.add_row(title, ", ".join(left[:SHOWN]) + more if left else "nothing")
    Console().print(table)
    return 0


def _facts(view: View) -> dict[str, Any]:
    encoder = view.encoder
    return {
        "encoder": encoder.config.model,
        "width": encoder.width,
        "patches": " x ".join(map(str, encoder.grid)),
        "images": view.preprocess.words(),
        "feature point": view.feature_point,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "text tower": f"{type(view.text).__name__}, {view.text.context} tokens" if view.text is not None else "none",
    }


@dataclass(frozen=True)
class Export:
    """Write weights for another library, have it load them, and compare what both compute."""

    weights: tyro.conf.Positional[str]
    """As `altsight load` takes them."""
    to: Literal["timm", "openclip", "huggingface", "onnx", "safetensors"]
    """openclip and huggingface take dual encoders."""
    out: Path
    """Folder to write; it must not exist yet, or be empty."""
    img_size: int = 0
    """Side of the images in pixels; position tables are resampled. 0: that of the weights."""
    results: Path | None = None
    """A file that `altsight eval --out` wrote, for the model card; a run's own results.json where none is given."""


def export(argv: Sequence[str]) -> int:
    """`altsight export WEIGHTS --to FORMAT --out DIR`."""
    options = tyro.cli(Export, args=argv, prog="altsight export")
    done = export_weights(options.weights, options.to, options.out, options.img_size, options.results)
    for what, difference in done.differences.items():
        console.print(f"{what}: differ by {difference:.2g} at most, as {done.library} computes them", highlight=False)
    console.print(f"-> {done.folder}, with README.md; use it so:\n", highlight=False)
    print(done.usage)
    return 0
