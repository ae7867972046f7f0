"""What compares and measures: `demo`, `study`, `eval`, `recipes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from altsight.commands.pretrain import stopped, tasks_of
from altsight.core import dist
from altsight.core.config import write_json
from altsight.core.errors import UserError
from altsight.hub.load import load_view
from altsight.recipes import demo_plan, study_plan
from altsight.recipes.cost import Machine
from altsight.recipes.show import as_json
from altsight.recipes.show import show as show_recipes
from altsight.study.plan import Plan
from altsight.study.run import evaluate_shown, open_tasks
from altsight.study.run import study as run_study
from altsight.train.loop import Stopped
from altsight.train.run import pick_device


@dataclass(frozen=True)
class Demo:
    """Compare MAE, CLIP and MUG like for like on the embedded sample data; a few minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Folder of the study; running again goes on where it stopped."""


def demo(argv: Sequence[str]) -> int:
    """`altsight demo`: the study of the demo's plan."""
    options = tyro.cli(Demo, args=argv, prog="altsight demo")
    return _study(demo_plan(), options.out)


@dataclass(frozen=True)
class Study:
    """Compare methods like for like, as a plan says, and write a report."""

    plan: tyro.conf.Positional[str]
    """The plan: a TOML file, of which altsight/recipes/demo_cpu.toml is one to start from, or a study of `recipes`."""
    out: Path = Path("runs/study")
    """Folder of the study; running again goes on where it stopped."""
    data: Path | None = None
    """Train on this prepared folder, and not on the plan's own data."""


def study(argv: Sequence[str]) -> int:
    """`altsight study PLAN.toml`, or `altsight study NAME`."""
    options = tyro.cli(Study, args=argv, prog="altsight study")
    return _study(study_plan(options.plan, options.data), options.out)


@dataclass(frozen=True)
class Recipes:
    """List the ready runs and studies with what they cost and what their sources found, or tell all about one."""

    name: tyro.conf.Positional[str] = ""
    """A recipe, a study or a method; all where none is given."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    json: bool = False
    """Print the numbers as JSON."""


def recipes(argv: Sequence[str]) -> int:
    """`altsight recipes [NAME]`."""
    options = tyro.cli(Recipes, args=argv, prog="altsight recipes")
    if options.json:
        print(json.dumps(as_json(options.name, options.machine), indent=1))
    else:
        show_recipes(options.name, options.machine, Console())
    return 0


def _study(plan: Plan, out: Path) -> int:
    try:
        run_study(plan, out)
    except Stopped as stop:
        return stopped(stop)
    finally:
        dist.stop()
    return 0


@dataclass(frozen=True)
class Eval:
    """Evaluate trained runs with the same evaluators on the same data."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    tasks: Path | None = None
    """A study plan (TOML) whose tasks are used; the demo's tasks on the sample data otherwise."""
    evaluators: tuple[str, ...] = ()
    """Names of evaluators; all where none is given."""
    out: Path | None = None
    """A JSON file for the results."""


def evaluate_runs(argv: Sequence[str]) -> int:
    """`altsight eval RUN ...`."""
    options = tyro.cli(Eval, args=argv, prog="altsight eval")
    if not options.runs:
        raise UserError("no run to evaluate: give the --out folder of `altsight pretrain`.")
    dist.start(pick_device("auto"))
    tasks = open_tasks(tasks_of(options.tasks))
    found = {}
    try:
        for folder in options.runs:
            results = evaluate_shown(load_view(str(folder)), tasks, options.evaluators or None)
            found[str(folder)] = [asdict(r) for r in results]
        if dist.world().is_main:
            print_results(found)
            if options.out is not None:
                write_json(options.out, found)
    finally:
        dist.stop()
    return 0


def print_results(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of results: weights -> the fields of each `Result`."""
    table = Table("weights", "task", "evaluator", "metric", "value", "95 % interval", "chance", "note")
    for folder, results in found.items():
        for r in results:
            value = "n/a" if r["value"] is None else f"{r['value']:.4f}"
            interval = "" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
            chance = "" if r["chance"] is None else f"{r['chance']:.4f}"
            table.add_row(folder, r["task"], r["evaluator"], r["metric"], value, interval, chance, r["note"])
    Console().print(table)
