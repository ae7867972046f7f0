"""Recipe dataclasses <-> JSON. Everything a run depends on is in one frozen `Run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs
from cattrs import transform_error
from cattrs.errors import BaseValidationError

from altsight.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer (any of timm's), schedule (linear warm-up, then down to `min_lr`, per step), clipping, EMA."""

    name: str = "adamw"
    lr: float = 1.5e-4
    lr_base_batch: int = 256
    """The learning rate used is lr * batch / lr_base_batch; 0 means that lr is absolute."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_fraction: float = 0.05
    """Share of the run's samples that the warm-up takes."""
    warmup_lr: float = 0.0
    """Learning rate of the very first step."""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """What follows the warm-up; step: a tenth from the share `step_at` of the run on."""
    step_at: float = 0.875
    power: float = 1.0
    """Of the linear schedule, whose rate is (1 - share of the run)^power: "poly" elsewhere."""
    min_lr: float = 0.0
    final_weight_decay: float | None = None
    """Weight decay at the end, reached on a half cosine (DINO); None: it stays."""
    decay_all: bool = False
    """Let biases, norms and tokens decay as well (MoCo v3, SimSiam)."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the encoder to the one below it."""
    lookahead: int = 0
    """Steps between the slow updates of Lookahead around the optimizer (VirTex: 5); 0: none."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 switches clipping off."""
    clip: Literal["whole", "tensor"] = "whole"
    """Whether the norm is that of the whole gradient, or each tensor is clipped by its own (DINO)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, kept beside them and used for evaluation; 0: none."""

    def peak_lr(self, batch: int) -> float:
        """Return the learning rate after warm-up for a global batch of `batch`."""
        return self.lr * batch / self.lr_base_batch if self.lr_base_batch else self.lr


def _exact(value: Any, kind: type[T]) -> T:
    """Refuse what cattrs would convert without a word: 3.5 to an int, "false" to a bool."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return kind(value)  # type: ignore[call-arg]


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _exact)


def to_dict(value: Any) -> Any:
    """Return a config dataclass as JSON-ready dicts, lists and scalars."""
    return json.loads(json.dumps(_converter.unstructure(value)))


def from_dict(data: Any, cls: type[T], where: str) -> T:
    """Build the dataclass `cls` from plain `data` read at `where`.

    Raises:
        UserError: a key is unknown or a value has the wrong type; the message names them.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} is no table of settings but {data!r}: mend it and run again.")
    try:
        return _converter.structure(data, cls)
    except BaseValidationError as error:
        problems = "; ".join(transform_error(error, path=where))
        raise UserError(f"{problems}: mend the setting and run again.") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the leaves of `over` put over it, table by table."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist.") from None
    except ValueError as error:
        raise UserError(f"'{path}' is no JSON ({error}): restore or remove it.") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON by way of a temporary file, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
