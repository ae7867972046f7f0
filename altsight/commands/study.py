"""What compares and measures: `demo`, `study`, `eval`, `recipes`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from altsight.commands.pretrain import stopped, tasks_of
from altsight.core import dist
from altsight.core.config import write_json
from altsight.core.errors import UserError
from altsight.evals import find as find_evaluator
from altsight.hub.load import load_view
from altsight.recipes import demo_plan, study_plan
from altsight.recipes.cost import Machine
from altsight.recipes.show import as_json
from altsight.recipes.show import show as show_recipes
from altsight.study.plan import Plan
from altsight.study.run import evaluate_shown
from altsight.study.run import study as run_study
from altsight.study.tasks import TaskConfig, open_tasks
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
    """Evaluate runs, or anyone's weights, with the same evaluators on the same data."""

    weights: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, files of weights, or names such as timm:MODEL."""
    tasks: Path | None = None
    """A TOML file of tasks, or a study's plan; the demo's tasks on the sample data where there is no --data."""
    data: str = ""
    """Instead of --tasks: a folder with a folder of images for each class, or other labelled data, to be classified."""
    label: str = "label"
    """JSON field with the class, where --data is not a folder of folders."""
    classes: str = ""
    """File of class names for --data: one a line in the order of the labels, or JSON {label: name}; or "imagenet"."""
    templates: str = ""
    """Prompts for --data: a file with one a line, or a named set such as imagenet, imagenet7 or cifar10."""
    subset: str = ""
    """The classes that --data has, where logits are restricted: a file, imagenet-a or imagenet-r."""
    evaluators: tuple[str, ...] = ()
    """Names of evaluators; the standard ones where none is given."""
    features: Path | None = None
    """Folder where features are kept: the same weights on the same images are not computed again."""
    out: Path | None = None
    """A JSON file for the results."""

    def configs(self) -> tuple[TaskConfig, ...]:
        """Return the tasks that are asked for.

        Raises:
            UserError: options that do not go together, or a file of tasks that is wrong.
        """
        of_data = {name: getattr(self, name) for name in ("classes", "templates", "subset")}
        if self.data and self.tasks:
            raise UserError("give --tasks or --data, not both: what --data says can stand in the file of tasks.")
        if self.data:
            name = Path(self.data.rstrip("/")).name
            return (TaskConfig(name, test=self.data, label=self.label, **of_data),)
        if alone := next((name for name, value in of_data.items() if value), ""):
            raise UserError(f"--{alone} is about --data: give both, or write it into the file of tasks.")
        return tasks_of(self.tasks)


def evaluate_runs(argv: Sequence[str]) -> int:
    """`altsight eval WEIGHTS ...`."""
    options = tyro.cli(Eval, args=argv, prog="altsight eval")
    if not options.weights:
        raise UserError("no weights to evaluate: give the --out folder of `altsight pretrain`, or anyone's weights.")
    for name in options.evaluators:
        find_evaluator(name)
    dist.start(pick_device("auto"))
    found = {}
    try:
        tasks = open_tasks(options.configs())
        if options.out is not None:
            _make_room(options.out)
        for source in options.weights:
            view = replace(load_view(source), store=options.features)
            results = evaluate_shown(view, tasks, options.evaluators or None)
            found[source] = [asdict(r) for r in results]
        idle = _require_a_number(found, options.evaluators)
        if dist.world().is_main:
            print_results(found)
            if idle:
                Console().print(f"nothing to measure for {' and '.join(idle)}: {NEEDS}")
            if options.out is not None:
                write_json(options.out, found)
    finally:
        dist.stop()
    return 0


def _make_room(out: Path) -> None:
    """Make the folder of the file `out`; UserError where it cannot be written, before hours of evaluation."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the results cannot be written to '{out}' ({error.strerror}): choose another --out.") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(
            f"the results cannot be written to '{out}', which is no file in a folder of yours: change --out."
        )


NEEDS = "the tasks lack what docs/evaluation.md says that it takes (labels, training images, captions ...)"


def _require_a_number(found: dict[str, list[dict[str, Any]]], evaluators: Sequence[str]) -> list[str]:
    """Return those of the `evaluators` asked for that found nothing to measure in any of the tasks.

    Raises:
        UserError: none of them did, or none applies to any of the weights.
    """
    results = [result for of_weights in found.values() for result in of_weights]
    idle = [name for name in evaluators if all(result["evaluator"] != name for result in results)]
    if evaluators and not results:
        raise UserError(f"there is nothing to measure for {' and '.join(evaluators)}: {NEEDS}.")
    if evaluators and all(result["value"] is None for result in results):
        reason = results[0]["note"].removeprefix("not applicable: ")
        raise UserError(
            f"{' and '.join(evaluators)} cannot be measured on {', '.join(found)} ({reason}): give other weights, or "
            "other --evaluators."
        )
    return idle


def print_results(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of results for each of the weights: weights -> the fields of each `Result`."""
    for source, results in found.items():
        table = Table(title=source, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        # Where the terminal is narrow, words go on in the next line, and no number is cut off.
        table.add_column("task", overflow="fold")
        table.add_column("evaluator", no_wrap=True)
        table.add_column("metric", overflow="fold")
        for name in ("value [95 % interval]", "chance"):
            table.add_column(name, no_wrap=True)
        table.add_column("note", overflow="fold")
        for r in results:
            value = "n/a" if r["value"] is None else f"{r['value']:.4f}"
            interval = "" if r["low"] is None else f" [{r['low']:.4f}, {r['high']:.4f}]"
            chance = "" if r["chance"] is None else f"{r['chance']:.4f}"
            table.add_row(r["task"], r["evaluator"], r["metric"], escape(value + interval), chance, escape(r["note"]))
        Console().print(table)
