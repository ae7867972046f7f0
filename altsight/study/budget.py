"""One budget -> samples per arm, fixed before training so that schedule and resume depend on samples alone."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altsight.core import dist
from altsight.core.config import from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError
from altsight.data.loader import Loader
from altsight.data.prepared import Prepared
from altsight.methods.base import Corpus
from altsight.study.pairs import data_of
from altsight.study.plan import Plan
from altsight.train.account import flops_per_sample
from altsight.train.curriculum import make_curriculum, set_input_size
from altsight.train.log import console, read_log
from altsight.train.loop import pretrain
from altsight.train.run import Run, build, pick_device

FILE = "budget.json"
WARM_UP, MEASURED = 4, 8
"""Steps that the speed measurement leaves out, and steps that it times."""
LONG = 10_000
"""Steps of a run long enough for the shares of a curriculum's stages to be exact."""


@dataclass(frozen=True)
class Resolved:
    """Samples per arm, and what was measured to find them."""

    samples: dict[str, int]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


def resolve(plan: Plan, prepared: Prepared, directory: Path) -> Resolved:
    """Return the samples that each arm may see; read from `directory` where an earlier start has found them.

    Raises:
        UserError: the budget pays for less than one batch of an arm.
    """
    path = directory / FILE
    if path.exists():
        return from_dict(read_json(path), Resolved, str(path))
    found = [_resolve_arm(plan, arm, prepared, directory) for arm in plan.arms]
    samples = {arm: count for arm, (count, _) in zip(plan.arms, found, strict=True)}
    measured = {arm: facts for arm, (_, facts) in zip(plan.arms, found, strict=True) if facts}
    # Clocks differ between ranks; what the main rank measured holds for all.
    resolved: Resolved = dist.gather_objects(Resolved(samples, measured))[0]
    if dist.world().is_main:
        write_json(path, to_dict(resolved))
    dist.barrier()
    return resolved


def _resolve_arm(plan: Plan, arm: str, prepared: Prepared, directory: Path) -> tuple[int, dict[str, float]]:
    budget, facts = plan.budget, {}
    run = plan.run(arm, plan.seeds[0], plan.train.batch)
    prepared = data_of(plan, arm, prepared)
    if budget.kind == "samples":
        wanted = float(budget.samples)
    elif budget.kind == "flops":
        facts["flops_per_sample"] = cost(run, prepared)
        wanted = budget.flops / facts["flops_per_sample"]
    else:
        facts["samples_per_second"] = speed(run, prepared, directory / "speed" / arm)
        wanted = budget.minutes * 60 * facts["samples_per_second"]
    batches = int(wanted) // run.train.batch
    if not batches:
        raise UserError(
            f"budget.{budget.kind}: {getattr(budget, budget.kind):g} pays for {wanted:.1f} samples of {arm}, less than "
            f"one batch of {run.train.batch}: raise the budget or lower train.batch."
        )
    return batches * run.train.batch, facts


def cost(run: Run[Any], prepared: Prepared) -> float:
    """Return the training FLOPs of one sample, counted on the first samples of the run; the mean over its stages."""
    method = build(run, Corpus.of(prepared))
    device = pick_device(run.train.device)
    few = min(4, run.train.batch)
    order = prepared.source.order(run.train.seed)
    # The stages of a long run, since how long this one is follows from what is counted here.
    curriculum = make_curriculum(run.accelerate, method, run.name, LONG, run.train.batch)
    method.to(device)
    total = 0.0
    for stage in curriculum.stages:
        set_input_size(method, stage.size)
        loader = Loader(prepared.source, order, curriculum.prepare_in(stage, method, run.data.crop), few)
        batch, _ = next(iter(loader.batches(dist.World(), 0, few)))
        total += (stage.stop - stage.start) / LONG * flops_per_sample(method, batch.to(device))
    return total


def speed(run: Run[Any], prepared: Prepared, directory: Path) -> float:
    """Return samples per second of the run's first real steps, warm-up left out; `directory` is used and removed."""
    samples = (WARM_UP + MEASURED) * run.train.batch
    # Two log lines: the first closes the warm-up, the second says how fast the steps since then were.
    train = dataclasses.replace(run.train, samples=samples, log_every=WARM_UP, probe_every=0, checkpoint_every=samples)
    _remove(directory)
    console.print(f"Measuring the speed of {directory.name}.")
    pretrain(dataclasses.replace(run, train=train), prepared, directory)
    lines = read_log(directory)
    dist.barrier()
    _remove(directory)
    timed = [line["samples_per_s"] for line in lines[1:]]
    return len(timed) / sum(1 / rate for rate in timed)


def _remove(folder: Path) -> None:
    if dist.world().is_main:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
