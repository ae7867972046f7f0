"""`pretrain`, and what `study` shares with it: how a stop is told, and which tasks a plan has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from altsight.core import dist
from altsight.core.errors import UserError
from altsight.data.prepared import open_prepared
from altsight.methods import METHODS
from altsight.recipes import demo_plan, missing_data, recipe
from altsight.study.run import online_probe
from altsight.study.tasks import TaskConfig, open_tasks, read_tasks
from altsight.train.log import console
from altsight.train.loop import Probe, Stopped
from altsight.train.loop import pretrain as train
from altsight.train.run import Run

M = TypeVar("M")


@dataclass(frozen=True)
class Pretrain(Generic[M]):
    """Pre-train one method on prepared data; the same command again goes on where the run stopped."""

    run: Annotated[Run[M], tyro.conf.arg(name="")]
    out: Path
    """Folder of the run."""
    probe: Path | None = None
    """A TOML file whose first task is probed every --train.probe-every samples; the demo's otherwise."""


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
    except Stopped as stop:
        return stopped(stop)
    finally:
        dist.stop()
    return 0


def stopped(stop: Stopped) -> int:
    """Say that a signal ended the work, and return the exit code."""
    if dist.world().is_main:
        print(f"altsight: {stop}.", file=sys.stderr)
    return 1


def _probe(run: Run[Any], plan: Path | None) -> Probe | None:
    if not run.train.probe_every:
        return None
    return online_probe(run.train, run.name, open_tasks(tasks_of(plan)[:1])[0])


def tasks_of(plan: Path | None) -> tuple[TaskConfig, ...]:
    """Return the tasks of the file `plan` (a list of tasks, or a study's plan), or the demo's."""
    return read_tasks(plan) if plan else demo_plan().tasks
