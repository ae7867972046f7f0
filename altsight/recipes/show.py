"""`altsight recipes`: the ready runs and studies with what they cost, and one of them in full."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from altsight.core.config import to_dict
from altsight.core.errors import UserError, did_you_mean
from altsight.methods import METHODS
from altsight.recipes.cost import Machine, stored
from altsight.recipes.library import STUDIES, Recipe, Study, data_sets, recipes
from altsight.study.wording import amount, flat, flops, setting
from altsight.train.run import default_run

GPUS_A_NODE = 8


@dataclass(frozen=True)
class Row:
    """One recipe or study in the list; None where nothing was counted. memory: bytes on each of `gpus` GPUs."""

    name: str
    methods: tuple[str, ...]
    data: str
    released: bool
    samples: int
    batch: int
    gpus: int
    flops: float | None
    gpu_hours: float | None
    memory: float | None
    expected: dict[str, float]
    source: str


def rows(name: str, machine: Machine) -> list[Row]:
    """Return the rows of all recipes and studies, of those of one method, or the one called `name`.

    Raises:
        UserError: there is no recipe, study or method of that name.
    """
    known = [_recipe_row(recipe, machine) for recipe in recipes().values()]
    if not name:
        return [*known, *(_study_row(study, machine) for study in STUDIES.values())]
    if name in STUDIES:
        return [_study_row(STUDIES[name], machine)]
    found = [row for row in known if name in (row.name, *row.methods)]
    if not found:
        raise UserError(f"there is no recipe '{name}'.{did_you_mean(name, [*recipes(), *STUDIES, *METHODS])}")
    return found


def show(name: str, machine: Machine, console: Console) -> None:
    """Print the list, a method's part of it, or all about the recipe or study called `name`."""
    found = rows(name, machine)
    if name in recipes():
        _show_recipe(recipes()[name], found[0], console)
    elif name in STUDIES:
        _show_study(STUDIES[name], found[0], machine, console)
    else:
        _show_list(found, console)
    console.print(_basis(machine), style="dim", highlight=False)


def as_json(name: str, machine: Machine) -> Any:
    """Return what `show` prints as plain data."""
    return [asdict(row) for row in rows(name, machine)]


def _recipe_row(recipe: Recipe, machine: Machine) -> Row:
    cost = stored().get("recipes", {}).get(recipe.name)
    total = cost.flops * recipe.seen if cost else None
    return Row(
        name=recipe.name,
        methods=(recipe.method,),
        data=recipe.data,
        released=recipe.data_set.released,
        samples=recipe.seen,
        batch=recipe.batch,
        gpus=recipe.gpus,
        flops=total,
        gpu_hours=machine.hours(total) if total else None,
        memory=cost.memory(recipe.batch / recipe.gpus) if cost else None,
        expected=recipe.expected,
        source=recipe.source,
    )


def _study_row(study: Study, machine: Machine) -> Row:
    """Return the sums over the study's arms, and the memory of the one that takes most."""
    plan = study.plan
    arms = [_arm_row(study, arm, machine) for arm in plan.arms]
    totals = [arm.flops for arm in arms if arm.flops is not None]
    total = sum(totals) * len(plan.seeds) if len(totals) == len(arms) else None
    return Row(
        name=study.name,
        methods=plan.arms,
        data=study.data or "samples",
        released=True,
        samples=max(arm.samples for arm in arms),
        batch=plan.train.batch,
        gpus=study.gpus,
        flops=total,
        gpu_hours=machine.hours(total) if total else None,
        memory=max(arm.memory or 0 for arm in arms) if total else None,
        expected={},
        source=study.about,
    )


def _arm_row(study: Study, arm: str, machine: Machine) -> Row:
    """Return what one arm costs; of a budget in FLOPs, as many samples as it pays for."""
    plan, cost = study.plan, stored().get(study.name, {}).get(arm)
    samples = plan.budget.samples if plan.budget.samples or not cost else round(plan.budget.flops / cost.flops)
    total = cost.flops * samples if cost else None
    return Row(
        name=arm,
        methods=(plan.method_of(arm),),
        data=study.data or "samples",
        released=True,
        samples=samples,
        batch=plan.train.batch,
        gpus=study.gpus,
        flops=total,
        gpu_hours=machine.hours(total) if total else None,
        memory=cost.memory(plan.train.batch / max(study.gpus, 1)) if cost else None,
        expected={},
        source=study.about,
    )


def _show_list(found: list[Row], console: Console) -> None:
    """Print two lines a row: what it costs, and what is expected of it. They fit 80 columns."""
    widths = [max(len(row.name) for row in found) + 2, 9, 14, 11, 16]
    studies = next((row for row in found if row.name in STUDIES), None)
    for row in found:
        if row in (found[0], studies):
            heads = ["study", "an arm"] if row is studies else ["recipe", "samples"]
            console.print(Text(_aligned([*heads, "FLOPs", "GPU-hours", "memory x GPUs"], widths), style="bold"))
        console.print(Text(_aligned([row.name, *_numbers(row)], widths)))
        console.print(Padding(Text(_said(row), style="dim"), (0, 0, 0, 4)))


def _aligned(cells: list[str], widths: list[int]) -> str:
    return cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))


def _said(row: Row) -> str:
    if row.name in STUDIES:
        return f"{len(row.methods)} arms: {row.source}"
    unreleased = "" if row.released else "; on data that were never released"
    return _expected(row) + unreleased


def _numbers(row: Row) -> list[str]:
    """Return samples, FLOPs, GPU-hours, and the memory of one GPU times how many."""
    hours = "-" if row.gpu_hours is None else f"{row.gpu_hours:,.0f}" if row.gpu_hours >= 10 else f"{row.gpu_hours:.2g}"
    memory = "-" if row.memory is None or not row.gpus else f"{row.memory / 1e9:,.0f} GB x {row.gpus:,}"
    return [amount(row.samples), "-" if row.flops is None else flops(row.flops), hours, memory]


def _expected(row: Row) -> str:
    numbers = ", ".join(f"{measure} {value}" for measure, value in row.expected.items())
    return f"{numbers} ({row.source})" if numbers else f"no number ({row.source})"


def _show_recipe(recipe: Recipe, row: Row, console: Console) -> None:
    run = recipe.run()
    console.print(Text.assemble((recipe.name, "bold"), f": {recipe.method} on {recipe.data_set.title}"))
    console.print(Text.assemble("Expected: ", _expected(row), "."))
    if recipe.notes:
        console.print(Text(recipe.notes))
    samples, total, hours, memory = _numbers(row)
    passes = f", {recipe.seen / recipe.data_set.samples:,.4g} passes over the data" if recipe.data_set.released else ""
    console.print(f"\n{samples} samples in {run.steps:,} steps of {recipe.batch:,}{passes}", highlight=False)
    share = f"{recipe.batch / recipe.gpus:g} samples on each"
    console.print(f"{total}, {hours} GPU-hours; {memory}, {share}", highlight=False)
    mine, usual = flat(to_dict(run)), flat(to_dict(default_run(recipe.method)))
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("setting", "here", "the method's default"):
        table.add_column(column)
    for name, value in mine.items():
        if usual.get(name) != value:
            table.add_row(name, setting(value), setting(usual.get(name)))
    console.print("", table, highlight=False)
    _say("Data", recipe.data_set.how(recipe.prepare), console)
    start = f"-m altsight pretrain {recipe.name} --data.path {recipe.data_set.folder}"
    commands = [recipe.prepare] if recipe.prepare else []
    _say("Commands", "\n".join([*commands, _launch(recipe.gpus, start), f"altsight eval runs/{recipe.name}"]), console)


def _show_study(study: Study, row: Row, machine: Machine, console: Console) -> None:
    console.print(Text.assemble((study.name, "bold"), f": {study.about}"))
    console.print(f"The plan is '{study.path}'.\n", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("arm", "samples", "FLOPs", "GPU-hours", "memory x GPUs"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in study.plan.arms:
        table.add_row(arm, *_numbers(_arm_row(study, arm, machine)))
    table.add_section()
    table.add_row("all", "", *_numbers(row)[1:])
    console.print(table, highlight=False)
    if study.data:
        _say("Data", data_sets()[study.data].how(study.prepare), console)
    used = {task.train.split("/")[1] for task in study.plan.tasks if task.train.startswith("raw/")}
    for name in sorted(used):
        _say(f"Evaluation on {data_sets()[name].title}", data_sets()[name].how(), console)
    start = f"-m altsight study {study.name} --out runs/{study.name}"
    prepare = [study.prepare] if study.data else []
    _say("Commands", "\n".join([*prepare, _launch(study.gpus, start)]), console)


def _launch(gpus: int, start: str) -> str:
    """Return the command that runs `start` on so many GPUs."""
    if gpus <= 1:
        return start.replace("-m altsight", "altsight")
    if gpus <= GPUS_A_NODE:
        return f"torchrun --nproc-per-node {gpus} {start}"
    nodes = f"--nnodes {gpus // GPUS_A_NODE} --nproc-per-node {GPUS_A_NODE}"
    return f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 {start}"


def _say(title: str, text: str, console: Console) -> None:
    console.print(f"\n[bold]{title}[/]")
    # Left to the terminal to wrap, so that commands can be copied.
    console.print(Text("\n".join(f"  {line}" for line in text.splitlines())), soft_wrap=True)


def _basis(machine: Machine) -> str:
    return (
        f"\nEstimates. GPU-hours: FLOPs at {machine.utilisation:.0%} of {machine.peak / 1e12:g} TFLOPs/s "
        "(--utilisation, --peak). Memory: weights, gradients, the optimizer's state and the activations of one GPU's "
        "share of the batch in bf16; --train.micro-batch lowers the last."
    )
