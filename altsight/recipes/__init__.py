"""Ready runs and plans by name: every method at its source's setting, the demo's, and the like-for-like studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from altsight.core.errors import UserError, did_you_mean
from altsight.evals.base import Task
from altsight.methods import METHODS
from altsight.recipes.library import STUDIES, data_sets, recipes
from altsight.study.plan import SAMPLES, Budget, Plan, read_plan, sources
from altsight.study.tasks import open_tasks
from altsight.train.run import Run, default_run, pick_precision

SAMPLE = "sample_"
"""`sample_clip` is clip as the demo trains it."""


def demo_plan() -> Plan:
    """Return the plan of `altsight demo`: minutes on two CPU cores; larger and longer where there is a GPU.

    A processor that does not compute in bf16 takes about 2.5 times as long a sample, and gets a third of the samples.
    """
    if torch.cuda.is_available():
        return read_plan(Path(__file__).with_name("demo_gpu.toml"))
    plan = read_plan(Path(__file__).with_name("demo_cpu.toml"))
    if pick_precision("auto", torch.device("cpu")) == torch.bfloat16:
        return plan
    return replace(plan, budget=Budget(samples=plan.budget.samples // 3))


def sample_tasks() -> list[Task]:
    """Return the tasks of the demo, on the embedded sample data."""
    return open_tasks(demo_plan().tasks)


def names() -> list[str]:
    """Return what `recipe` knows: the methods, the demo's arms, and the papers' own settings."""
    return [*METHODS, *(SAMPLE + arm for arm in demo_plan().arms), *recipes()]


def recipe(name: str) -> Run[Any]:
    """Return the run called `name`: a method with its defaults, an arm of the demo, or a paper's own setting.

    Raises:
        UserError: there is no method or recipe of that name.
    """
    if name in METHODS:
        return default_run(name)
    if name in recipes():
        return recipes()[name].run()
    plan = demo_plan()
    arm = name.removeprefix(SAMPLE)
    if not name.startswith(SAMPLE) or arm not in plan.arms:
        raise UserError(f"there is no method or recipe '{name}'.{did_you_mean(name, names())}")
    return plan.run(arm, plan.seeds[0], plan.budget.samples)


def missing_data(name: str) -> str:
    """Return what to tell a user who starts the recipe called `name` without data."""
    if name in recipes():
        return recipes()[name].missing_data()
    return "no data to train on: give --data.path, the folder that `altsight prepare` wrote."


def study_plan(name: str, data: Path | None = None) -> Plan:
    """Return the plan called `name`, a TOML file or one of `STUDIES`; `data` takes the place of its training data.

    Paths in a packaged plan are relative to the folder in which altsight was called.

    Raises:
        UserError: there is no such plan, it is wrong, or data that it names are not there; the message says where to
            get them.
    """
    if name not in STUDIES:
        if not name.endswith(".toml") and not Path(name).exists():
            raise UserError(f"there is no plan '{name}'.{did_you_mean(name, STUDIES)}")
        return read_plan(Path(name), data=data)
    plan = read_plan(STUDIES[name].path, Path.cwd(), data)
    if data is None and plan.source is None and not Path(plan.data.path).exists():
        _refuse(f"{name} learns from", STUDIES[name].data, plan.data.path, STUDIES[name].prepare)
    for path in sources(plan):
        if not path.startswith(SAMPLES) and not Path(path).exists():
            _refuse(f"{name} evaluates on", Path(path).relative_to(Path.cwd()).parts[1], path)
    return plan


def _refuse(what: str, data: str, path: str, prepare: str = "") -> None:
    known = data_sets()[data]
    raise UserError(f"{what} {known.title}, and '{path}' does not exist. {known.how(prepare)}")
