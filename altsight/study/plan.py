"""A study's plan: which methods, seeds, budget, data and tasks; read from TOML."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from altsight.core.config import from_dict, merge, to_dict
from altsight.core.errors import UserError, did_you_mean
from altsight.data.samples import SAMPLES as SAMPLES
from altsight.data.samples import check_samples
from altsight.data.samples import locate as locate
from altsight.methods import METHODS, find
from altsight.nn.encoder import EncoderConfig
from altsight.study.tasks import SPLITS, TaskConfig
from altsight.train.run import DataConfig, Run, TrainConfig, default_run

PROBES = 8
"""Points of the online probe curve, where the plan does not set `train.probe_every`."""
LOG_LINES = 100
"""Points of a loss curve, at least, where a run has as many steps."""

UNTRAINED = "untrained"
"""Arm of the initial encoder."""

BudgetKind = Literal["samples", "flops", "minutes"]


@dataclass(frozen=True)
class Budget:
    """What every arm may spend: exactly one of the three is above 0.

    samples: samples seen. flops: training FLOPs. minutes: training time on this machine, turned into a number of
    samples per method before training starts.
    """

    samples: int = 0
    flops: float = 0.0
    minutes: float = 0.0

    @property
    def kind(self) -> BudgetKind:
        """Which of the three is set.

        Raises:
            UserError: none is, or more than one.
        """
        kinds: tuple[BudgetKind, ...] = ("samples", "flops", "minutes")
        given = [kind for kind in kinds if getattr(self, kind) > 0]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise UserError(f"the budget sets {what}: set exactly one of samples, flops and minutes, above 0.")
        return given[0]


@dataclass(frozen=True)
class SourceConfig:
    """Raw shards that the study prepares itself; as in `altsight prepare`."""

    path: str
    captions: tuple[str, ...] = ("{txt}",)
    label: str = ""
    tokenizer: str = ""
    vocab_size: int = 8192
    images_only: bool = False


@dataclass(frozen=True)
class Plan:
    """A like-for-like study: every arm gets the same encoder, data order and budget, and the same evaluation.

    methods are the arms that compete: names of methods, or of `variants`. references are trained like them and shown
    beside them, but never win. untrained adds the initial encoder.
    overrides: arm -> {"method", "optim", "train", "data"} -> settings that replace the method's own defaults.
    """

    name: str
    methods: tuple[str, ...]
    budget: Budget
    tasks: tuple[TaskConfig, ...]
    source: SourceConfig | None = None
    """Shards to prepare inside the study's folder; the other way is `data.path`, an already prepared folder."""
    references: tuple[str, ...] = ()
    variants: dict[str, str] = field(default_factory=dict)
    """Arm -> its method, where an arm has a name of its own: one method under several settings."""
    pairs: tuple[str, ...] = ()
    """Arms that are shown one image with its sentence of each interleaved document, and not the whole of it."""
    untrained: bool = True
    seeds: tuple[int, ...] = (0,)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that is trained, references last."""
        return self.methods + self.references

    def method_of(self, arm: str) -> str:
        """Return the name of the arm's method in `METHODS`."""
        return self.variants.get(arm, arm)

    def check(self) -> None:
        """Raise UserError if the plan cannot be carried out as it stands; the message starts with the key."""
        _check_arms(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)} must name each seed once, and at least one.")
        if not self.tasks or len({task.name for task in self.tasks}) < len(self.tasks):
            raise UserError("tasks: name at least one task to evaluate on, each under a name of its own.")
        for task in self.tasks:
            if missing := [split for split in SPLITS if not getattr(task, split)]:
                raise UserError(f"tasks: '{task.name}' has no `{missing[0]}`, which a study probes with.")
        if (self.source is None) == (not self.data.path):
            raise UserError("data.path: give a prepared folder here, or raw shards under [source]; one of the two.")
        for word in sources(self):
            check_samples(word)
        try:
            _ = self.budget.kind
        except UserError as error:
            raise UserError(f"budget: {error}") from None
        for arm in self.arms:
            self.run(arm, self.seeds[0], self.train.batch)

    def run(self, arm: str, seed: int, samples: int) -> Run[Any]:
        """Return the pre-training of one arm: the method's defaults, the plan's settings, the arm's overrides.

        Raises:
            UserError: an override is unknown or of the wrong type.
        """
        train = dataclasses.replace(self.train, samples=samples, seed=seed)
        method = self.method_of(arm)
        shared = dataclasses.replace(default_run(method), encoder=self.encoder, data=self.data, train=train)
        merged = merge(to_dict(shared), self.overrides.get(arm, {}))
        kind: Any = Run[find(method).Config]  # type: ignore[misc]
        run: Run[Any] = from_dict(merged, kind, f"overrides.{arm}")
        probe_every = run.train.probe_every or max(run.steps // PROBES, 1) * run.train.batch
        log_every = min(run.train.log_every, max(run.steps // LOG_LINES, 1))
        train = dataclasses.replace(run.train, probe_every=probe_every, log_every=log_every)
        return dataclasses.replace(run, train=train)

    def runs(self, samples: Mapping[str, int]) -> list[tuple[str, Run[Any]]]:
        """Return (arm, its run) for every seed and arm; `samples`: arm -> the samples it may see."""
        return [(arm, self.run(arm, seed, samples[arm])) for seed in self.seeds for arm in self.arms]


def read_plan(path: Path, folder: Path | None = None, data: Path | None = None) -> Plan:
    """Read a plan from a TOML file; its relative paths are relative to `folder`, by default that of the file.

    data: a prepared folder to train on instead of the plan's own.

    Raises:
        UserError: the file is missing or wrong; the message names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the plan '{path}' does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the plan '{path}' is no TOML ({error}): mend that line.") from None
    plan = _anchored(from_dict(table, Plan, str(path)), folder or path.resolve().parent)
    if data is not None:
        plan = dataclasses.replace(plan, source=None, data=dataclasses.replace(plan.data, path=str(data)))
    try:
        plan.check()
    except UserError as error:
        raise UserError(f"'{path}', {error}") from None
    return plan


def _anchored(plan: Plan, folder: Path) -> Plan:
    """Return the plan with its relative paths made absolute against `folder`."""

    def anchor(word: str) -> str:
        return word if not word or word.startswith(SAMPLES) else str(folder / word)

    tasks = tuple(task.anchored(folder) for task in plan.tasks)
    source = plan.source and dataclasses.replace(plan.source, path=anchor(plan.source.path))
    data = dataclasses.replace(plan.data, path=anchor(plan.data.path))
    return dataclasses.replace(plan, tasks=tasks, source=source, data=data)


def _check_arms(plan: Plan) -> None:
    if not plan.methods:
        raise UserError("methods: name at least one method to train.")
    for arm, method in plan.variants.items():
        if method not in METHODS:
            raise UserError(f"variants.{arm}: there is no method '{method}'.{did_you_mean(method, METHODS)}")
        if arm in METHODS or arm == UNTRAINED or not re.fullmatch(r"\w[\w+-]*", arm):
            raise UserError(f"variants: '{arm}' must be a name of its own, of letters, digits, '_', '-' and '+'.")
    known = [*METHODS, *plan.variants]
    for key, names in (("methods", plan.methods), ("references", plan.references), ("overrides", plan.overrides)):
        for name in names:
            if name not in known:
                raise UserError(f"{key}: there is no method '{name}'.{did_you_mean(name, known)}")
    if len(set(plan.arms)) < len(plan.arms):
        raise UserError(
            f"methods: {list(plan.arms)} names an arm twice; a method under several settings needs [variants]."
        )
    for key, used in (("variants", plan.variants), ("pairs", plan.pairs), ("overrides", plan.overrides)):
        for name in used:
            if name not in plan.arms:
                raise UserError(f"{key}.{name}: the plan does not train {name}.{did_you_mean(name, plan.arms)}")
    for name, over in plan.overrides.items():
        _check_override(name, over)


def _check_override(name: str, over: Mapping[str, Any]) -> None:
    for table in ("encoder", "name"):
        if table in over:
            raise UserError(f"overrides.{name}.{table}: all arms share one encoder, and an arm keeps its name.")
    for table, key in (("train", "samples"), ("train", "seed"), ("data", "path")):
        if isinstance(over.get(table), Mapping) and key in over[table]:
            raise UserError(f"overrides.{name}.{table}.{key}: this is one for all arms; set it for the whole plan.")


def sources(plan: Plan) -> Iterator[str]:
    """Yield every source that the plan names, as it is written there."""
    if plan.source is not None:
        yield plan.source.path
    for task in plan.tasks:
        yield from (task.train, task.val, task.test)
