"""The commands of `altsight.cli`: each parses its own options with tyro and calls the Python interface."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from altsight.core import dist
from altsight.core.config import write_json
from altsight.core.errors import UserError
from altsight.data.check import check as check_data
from altsight.data.mix import MixConfig
from altsight.data.mix import mix as mix_data
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig
from altsight.data.prepare import prepare as prepare_data
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.sheet import write_sheet
from altsight.data.show import show
from altsight.evals.load import load_view
from altsight.methods import METHODS
from altsight.recipes import demo_plan, missing_data, recipe, study_plan
from altsight.recipes.cost import Machine
from altsight.recipes.show import as_json
from altsight.recipes.show import show as show_recipes
from altsight.study.plan import Plan, TaskConfig, locate, read_plan
from altsight.study.run import evaluate_shown, online_probe, open_tasks
from altsight.study.run import study as run_study
from altsight.train.log import console, progress_bar
from altsight.train.loop import Probe, Stopped
from altsight.train.loop import pretrain as train
from altsight.train.run import Run, pick_device

M = TypeVar("M")


@dataclass(frozen=True)
class Demo:
    """Compare MAE, CLIP and MUG like for like on the embedded sample data; a few minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Folder of the study; running again goes on where it stopped."""


def demo(argv: Sequence[str]) -> int:
    """`altsight demo`: the study of the demo's plan."""
    options = tyro.cli(Demo, args=argv, prog="altsight demo")
    return _study(demo_plan(), options.out)


def prepare(argv: Sequence[str]) -> int:
    """`altsight prepare SOURCE --out DIR`."""
    about = "Index a corpus for training: where every sample lies, statistics, a tokenizer. Nothing is copied."
    options = tyro.cli(PrepareConfig, args=argv, prog="altsight prepare", description=about)
    options = replace(options, source=locate(options.source), images=locate(options.images))
    try:
        with progress_bar() as bar:
            prepared = prepare_data(options, lambda what, done, total: draw(bar, what, done, total))
    except KeyboardInterrupt:
        print("altsight: stopped; run the same command again to go on with the shards that are left.", file=sys.stderr)
        return 130
    _say_prepared(prepared)
    return 0


def mix(argv: Sequence[str]) -> int:
    """`altsight mix DIR DIR ... --out DIR`."""
    about = "Make one data set of several prepared ones, from which a run draws by weight."
    options = tyro.cli(MixConfig, args=argv, prog="altsight mix", description=about)
    with progress_bar() as bar:
        prepared = mix_data(options, lambda what, done, total: draw(bar, what, done, total))
    _say_prepared(prepared)
    return 0


def _say_prepared(prepared: Prepared) -> None:
    counted, parts = prepared.statistics, prepared.source.parts()
    left_out = f", {counted['left_out']:,} records without an image left out" if counted["left_out"] else ""
    texts = f", {counted['captions']:,} texts" if counted["captions"] else ""
    where = f"{len(parts):,} {'source' if isinstance(prepared.source, Mixture) else 'shard'}{'s' * (len(parts) > 1)}"
    console.print(f"{len(prepared.source):,} samples in {where}{texts}{left_out} -> {prepared.directory}")


def draw(bar: Progress, what: str, done: int, total: int) -> None:
    """Move the task called `what` of a progress bar; it is added when it is first heard of."""
    ids = {task.description: task.id for task in bar.tasks}
    number = ids[what] if what in ids else bar.add_task(what, total=total, note="")
    bar.update(number, completed=done, total=total)


@dataclass(frozen=True)
class Check:
    """Report on prepared data before a run: what is in it, what is wrong with it, how many steps a run will take."""

    data: tyro.conf.Positional[Path]
    """Folder that `altsight prepare` wrote."""
    batch: int = 256
    """Global batch of the run."""
    samples: int = 100_000
    """Samples that the run is to see."""
    context: int = 77
    """Tokens that the text tower of the run reads; longer captions are cut."""
    most: int = 50_000
    """Samples that are looked at, in blocks spread over the data; 0: all."""
    workers: int = os.cpu_count() or 1
    """Processes that decode."""
    sheet: Path | None = None
    """Write a contact sheet of random samples here (.html or .png)."""
    sheet_samples: int = 60
    """Samples on the contact sheet."""
    json: bool = False
    """Print the report as JSON, and nothing else on standard output."""


def check(argv: Sequence[str]) -> int:
    """`altsight check DIR`."""
    options = tyro.cli(Check, args=argv, prog="altsight check")
    prepared = open_prepared(options.data)
    with progress_bar(transient=True) as bar:
        progress = partial(draw, bar)
        if options.sheet is not None:
            write_sheet(prepared, options.sheet, options.sheet_samples, progress=progress)
            console.print(f"contact sheet -> {options.sheet}", highlight=False)
        report = check_data(
            prepared,
            batch=options.batch,
            samples=options.samples,
            workers=options.workers,
            context=options.context,
            most=options.most,
            progress=progress,
        )
    if options.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        show(report, Console())
    return 0


@dataclass(frozen=True)
class Pretrain(Generic[M]):
    """Pre-train one method on prepared data; the same command again goes on where the run stopped."""

    run: Annotated[Run[M], tyro.conf.arg(name="")]
    out: Path
    """Folder of the run."""
    probe: Path | None = None
    """A study plan (TOML) whose first task is probed every --train.probe-every samples; the demo's otherwise."""


def pretrain(argv: Sequence[str]) -> int:
    """`altsight pretrain NAME --data.path DIR [--out DIR] [settings]`."""
    if not argv or argv[0].startswith("-"):
        methods = ", ".join(METHODS)
        print(f"usage: altsight pretrain NAME [options]      NAME: a recipe (`altsight recipes`), or one of {methods}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    chosen = recipe(argv[0])
    kind: Any = Pretrain[type(chosen.method)]  # type: ignore[misc]
    default = Pretrain(chosen, Path("runs") / argv[0])
    options = tyro.cli(kind, args=argv[1:], default=default, prog=f"altsight pretrain {argv[0]}")
    if not options.run.data.path:
        raise UserError(missing_data(argv[0]))
    run = options.run
    try:
        done = train(run, open_prepared(run.data.path), options.out, _probe(run, options.probe))
        if dist.world().is_main:
            cost = f"{done.flops:.3g} FLOPs, {done.wall_seconds:.0f} s"
            console.print(f"{done.samples_seen:,} samples, {cost} -> {options.out}")
    except Stopped as stopped:
        return _stopped(stopped)
    finally:
        dist.stop()
    return 0


def _stopped(stopped: Stopped) -> int:
    if dist.world().is_main:
        print(f"altsight: {stopped}.", file=sys.stderr)
    return 1


def _probe(run: Run[Any], plan: Path | None) -> Probe | None:
    if not run.train.probe_every:
        return None
    return online_probe(run.train, run.name, open_tasks(_tasks(plan)[:1])[0])


def _tasks(plan: Path | None) -> tuple[TaskConfig, ...]:
    return (read_plan(plan) if plan else demo_plan()).tasks


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
    tasks = open_tasks(_tasks(options.tasks))
    found = {}
    try:
        for folder in options.runs:
            results = evaluate_shown(load_view(folder), tasks, options.evaluators or None)
            found[str(folder)] = [asdict(r) for r in results]
        if dist.world().is_main:
            _print_results(found)
            if options.out is not None:
                write_json(options.out, found)
    finally:
        dist.stop()
    return 0


def _print_results(found: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("run", "task", "evaluator", "metric", "value", "95 % interval", "chance", "note")
    for folder, results in found.items():
        for r in results:
            value = "n/a" if r["value"] is None else f"{r['value']:.4f}"
            interval = "" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
            chance = "" if r["chance"] is None else f"{r['chance']:.4f}"
            table.add_row(folder, r["task"], r["evaluator"], r["metric"], value, interval, chance, r["note"])
    Console().print(table)


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
    except Stopped as stopped:
        return _stopped(stopped)
    finally:
        dist.stop()
    return 0
