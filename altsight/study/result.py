"""What a study found: the arms with their facts and numbers, kept in `study.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from altsight.core.config import from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError
from altsight.evals.base import Result
from altsight.study.plan import UNTRAINED as UNTRAINED
from altsight.study.plan import Plan
from altsight.train.state import Summary

FILE = "study.json"

Kind = Literal["method", "reference", "untrained"]


@dataclass(frozen=True)
class Evaluation:
    """What `results.json` holds."""

    results: tuple[Result, ...]


@dataclass(frozen=True)
class Arm:
    """One encoder of the study: a method under one seed, a reference, or the untrained encoder."""

    name: str
    seed: int
    kind: Kind
    initial_encoder: str
    """Hash of the encoder's weights before training."""
    results: tuple[Result, ...] = ()
    summary: Summary | None = None
    run: dict[str, Any] = field(default_factory=dict)
    """The `Run` as a dict; {} for the untrained encoder."""
    modules: dict[str, int] = field(default_factory=dict)
    """Part of the method -> parameters that it trains."""

    @property
    def folder(self) -> str:
        """Where the run lies inside the study's folder."""
        return f"arms/{self.name}/seed_{self.seed}"


@dataclass(frozen=True)
class StudyResult:
    """Everything that the report is made from, besides the runs' own folders."""

    plan: Plan
    directory: Path
    samples: dict[str, int]
    """Arm -> samples it may see: the plan's budget, resolved before training."""
    arms: tuple[Arm, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    device: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    """What is known of the training data: folder, hash, statistics."""
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    """Arm -> what was measured to resolve the budget (FLOPs per sample, samples per second)."""

    @property
    def names(self) -> list[str]:
        """Names of the arms, each once, in the order of the plan, the untrained encoder last."""
        order = {name: place for place, name in enumerate([*self.plan.arms, UNTRAINED])}
        return sorted({arm.name for arm in self.arms}, key=order.__getitem__)

    def of(self, name: str) -> list[Arm]:
        """Return the arms called `name`, one per seed."""
        return [arm for arm in self.arms if arm.name == name]

    def kind(self, name: str) -> Kind:
        """Return what kind of arm `name` is."""
        return self.of(name)[0].kind

    def path(self, arm: Arm) -> Path:
        """Return the folder of the arm's run."""
        return self.directory / arm.folder


def save_study(result: StudyResult) -> None:
    """Write `study.json` into the study's folder."""
    data = to_dict(result)
    del data["directory"]
    write_json(result.directory / FILE, data)


def load_study(directory: Path) -> StudyResult:
    """Read the study in `directory`, finished or not.

    Raises:
        UserError: there is none, or it was written by another version.
    """
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"'{directory}' holds no study (it has no {FILE}): run `altsight study PLAN.toml` first.")
    return from_dict({**read_json(path), "directory": str(directory)}, StudyResult, str(path))
