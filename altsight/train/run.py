"""A `Run`: everything that a pre-training depends on, in one frozen dataclass, and the method built from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn
from tyro.conf import Suppress

from altsight.core.config import OptimConfig, from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import key
from altsight.data.views import Crop
from altsight.methods import find
from altsight.methods.base import Corpus, Method, check_encoder
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.curriculum import AccelerateConfig

M = TypeVar("M")


@dataclass(frozen=True)
class DataConfig:
    """What is learned from: a folder that `altsight prepare` wrote, and how its images are cropped."""

    path: str = ""
    crop: Crop = field(default_factory=Crop)
    workers: int = 1
    """Processes that decode ahead; the samples do not depend on it."""
    max_bad_fraction: float = 0.05
    """The run stops when more than this share of the samples seen had to be replaced (looked at from 1,000 on)."""
    cache: str = ""
    """Folder for local copies of remote blocks and Parquet row groups; empty: altsight's in the user's cache folder."""
    cache_gb: float = 16.0
    """Size that the cache keeps to; 0: none, every remote sample is read on its own."""
    stall_limit: float = 600.0
    """Seconds without data after which the run stops and says what it waited for."""


@dataclass(frozen=True)
class TrainConfig:
    """Budget, batch, precision and what is written when."""

    samples: int = 100_000
    """Samples seen by the whole run; rounded down to whole batches."""
    batch: int = 256
    """Global batch: over all ranks and micro-batches."""
    micro_batch: int = 0
    """Samples that one rank computes at a time; 0: its whole share. Losses that compare the whole batch stay exact."""
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the processor has it, fp32 elsewhere."""
    device: str = "auto"
    compile: bool = False
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 50_000
    """Samples between checkpoints; one is written at the end in any case."""
    keep: int = 2
    """Checkpoints that are kept."""
    probe_every: int = 0
    """Samples between online probes; 0: none."""
    max_skipped: int = 5
    """The run stops after this many non-finite steps in a row."""


@dataclass(frozen=True)
class Run(Generic[M]):
    """One pre-training. `name` is the method's name in `METHODS`, `method` its own configuration."""

    name: Suppress[str]
    method: M
    optim: OptimConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    accelerate: AccelerateConfig = field(default_factory=AccelerateConfig)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.train.samples // self.train.batch


def default_run(name: str) -> Run[Any]:
    """Return a run of the method `name` with every setting at its source's default.

    Raises:
        UserError: there is no such method.
    """
    cls = find(name)
    return Run(name=name, method=cls.Config(), optim=cls.optim)


def override(run: Run[Any], settings: Mapping[str, Any]) -> Run[Any]:
    """Return `run` with dotted settings replaced, for example {"train.samples": 1000, "method.mask_ratio": 0.6}.

    Raises:
        UserError: there is no such setting, or the value has the wrong type.
    """
    data = to_dict(run)
    for dotted, value in settings.items():
        *path, last = dotted.split(".")
        table = data
        for name in path:
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict) or last not in table:
            raise UserError(f"{run.name} has no setting '{dotted}'.{did_you_mean(dotted, _dotted(data))}")
        table[last] = to_dict(value)
    return _from_dict(data, "override")


def save_run(run: Run[Any], path: Path) -> None:
    """Write `run` as JSON."""
    write_json(path, to_dict(run))


def load_run(path: Path) -> Run[Any]:
    """Read a run that `save_run` wrote.

    Raises:
        UserError: the file is missing, no JSON, or names an unknown method or setting.
    """
    data = read_json(path)
    if not isinstance(data, dict) or "name" not in data:
        raise UserError(f"'{path}' does not describe a run: it names no method.")
    return _from_dict(data, str(path))


def identity(run: Run[Any]) -> Any:
    """Return the settings that must not change when a run goes on."""
    free = {
        "cache",
        "cache_gb",
        "stall_limit",
        "workers",
        "micro_batch",
        "device",
        "compile",
        "log_every",
        "checkpoint_every",
        "keep",
    }
    settings = to_dict(run)
    for group in ("data", "train"):
        settings[group] = {name: value for name, value in settings[group].items() if name not in free}
    return settings


def _from_dict(data: dict[str, Any], where: str) -> Run[Any]:
    kind: Any = Run[find(data["name"]).Config]  # type: ignore[misc]
    run: Run[Any] = from_dict(data, kind, where)
    return run


def _dotted(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all leaves."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def construct(run: Run[Any], corpus: Corpus) -> Method:
    """Build the method of `run` without weights, on the CPU: for one whose weights are loaded.

    Raises:
        UserError: the method cannot be built on this corpus or encoder.
    """
    cls = find(run.name)
    encoder = Encoder(run.encoder)
    check_encoder(run.name, cls, encoder)
    method: Method = cls(run.method, encoder, corpus)  # type: ignore[call-arg]
    return method


def build(run: Run[Any], corpus: Corpus) -> Method:
    """Build the method of `run` with its initial weights, on the CPU; see `construct`.

    Raises:
        UserError: the method cannot be built, or weights that it begins with cannot be read.
    """
    method = construct(run, corpus)
    method.init_weights(key(run.train.seed, 0, "init"))
    return method


def check_least_batch(run: Run[Any], method: Method) -> None:
    """Raise UserError if the global batch of `run` is too small for the method's loss to be defined on it."""
    if run.train.batch < method.least_batch:
        raise UserError(
            f"{run.name} tells the samples of a batch from each other, and a batch of {run.train.batch} has no others: "
            f"use --train.batch {method.least_batch} or more."
        )


def weights_hash(module: nn.Module) -> str:
    """Return 12 hex digits of the parameters and buffers of an encoder, or of any module: equal weights, equal hash."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def pick_device(name: str) -> torch.device:
    """Return the device for `name`; 'auto' is this rank's GPU where there is one, the CPU elsewhere."""
    import os

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{name}' cannot be used ({reason}): try --train.device cpu.") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast for `name`; 'auto' is bf16 where the processor computes in it."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if native else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32
