"""Ready runs and plans by name: every method at its source's setting, and the ones of the demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from altsight.core.errors import UserError, did_you_mean
from altsight.evals.base import Task
from altsight.methods import METHODS
from altsight.study.plan import Budget, Plan, read_plan
from altsight.study.run import open_tasks
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
    """Return what `recipe` knows: the methods, and the demo's arms."""
    return [*METHODS, *(SAMPLE + arm for arm in demo_plan().arms)]


def recipe(name: str) -> Run[Any]:
    """Return the run called `name`.

    Raises:
        UserError: there is no method or recipe of that name.
    """
    if name in METHODS:
        return default_run(name)
    plan = demo_plan()
    arm = name.removeprefix(SAMPLE)
    if not name.startswith(SAMPLE) or arm not in plan.arms:
        raise UserError(f"there is no method or recipe '{name}'.{did_you_mean(name, names())}")
    return plan.run(arm, plan.seeds[0], plan.budget.samples)
