"""Tiny runs of every method, for the contract tests: the same encoder, seconds on one core."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from altsight.core.config import OptimConfig, from_dict, to_dict
from altsight.data.views import Crop
from altsight.methods import find
from altsight.nn.encoder import EncoderConfig
from altsight.train.run import DataConfig, Run, TrainConfig

ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=48, depth=2, heads=3)

_SMALLER = {
    "width": 48,
    "heads": 3,
    "depth": 1,
    "layers": 2,
    "context": 16,
    "sequence": 48,
    "length": 16,
    "vocabulary": 128,
    "mask_unit": 16,
    "embed_dim": 32,
    "prototypes": 64,
    "bottleneck": 32,
    "locals": 2,
    "hidden": 64,
    "out_dim": 32,
    "dropout": 0.0,
    "cross_dropout": 0.0,
    "head_lr_scale": 1.0,
    "queries": 8,
}
"""Fields of a method's nested configs that make it tiny wherever they appear."""


def tiny_run(name: str, data: Path, samples: int, batch: int = 32, **train: Any) -> Run[Any]:
    """Return a run of the method `name` at a size for tests."""
    cls = find(name)
    method = from_dict(_shrink(to_dict(cls.Config())), cls.Config, "tiny")
    return Run(
        name=name,
        method=method,
        optim=OptimConfig(lr=2e-3, lr_base_batch=0, warmup_fraction=0.1),
        encoder=ENCODER,
        data=DataConfig(str(data), Crop(scale=(0.5, 1.0)), workers=0),
        train=TrainConfig(samples=samples, batch=batch, precision="fp32", device="cpu", log_every=1, **train),
    )


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    small = {}
    for name, value in config.items():
        if isinstance(value, dict):
            small[name] = _shrink(value)
        elif name == "parts":
            small[name] = [part | {"settings": _shrink(to_dict(find(part["name"]).Config()))} for part in value]
        elif name.endswith("modal_layers"):
            small[name] = 1
        else:
            small[name] = _SMALLER.get(name, value) if value is not None else None
    return small


def with_seed(run: Run[Any], seed: int) -> Run[Any]:
    """Return `run` under another seed."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))
