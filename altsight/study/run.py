"""The like-for-like study: every arm from the same encoder, on the same samples, through the same evaluation.

A study is its folder. Whatever is finished there (data, budget, arms, evaluations) is taken as it is; running the same
plan again goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from altsight.core import dist
from altsight.core.config import from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared
from altsight.evals import STANDARD, evaluate
from altsight.evals.base import Preprocess, Result, Split, Task, View
from altsight.evals.load import load_method, view_of
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoder
from altsight.study.budget import resolve
from altsight.study.pairs import data_of
from altsight.study.plan import Plan, locate
from altsight.study.report import write_report
from altsight.study.result import UNTRAINED, Arm, Evaluation, Kind, StudyResult, save_study
from altsight.study.table import print_table
from altsight.study.tasks import open_tasks
from altsight.train.log import console, progress_bar
from altsight.train.loop import Probe, pretrain
from altsight.train.run import TrainConfig, build, pick_device, pick_precision, weights_hash

__all__ = ["StudyResult", "study"]

PROBE_TRAIN, PROBE_VAL = 1024, 512
"""Samples of the online probe's gallery, and those it is tested on: enough for a curve, too few for a result."""
LIBRARIES = ("torch", "timm", "tokenizers", "numpy", "altsight")


def study(plan: Plan, directory: Path) -> StudyResult:
    """Carry out `plan` in `directory` and write `study.json` and `report.html` there.

    Collective under torchrun: every rank calls it, the main rank writes.

    Raises:
        UserError: the plan cannot be carried out, or the folder holds another study.
        altsight.train.loop.Stopped: a signal asked for the end; what is finished stays, and running again goes on.
    """
    plan.check()
    dist.start(pick_device(plan.train.device))
    _claim(directory, plan)
    prepared = open_data(plan, directory)
    tasks = open_tasks(plan.tasks)
    modules = {seed: check_same_start(plan, prepared, seed) for seed in plan.seeds}
    resolved = resolve(plan, prepared, directory)
    result = StudyResult(plan, directory, resolved.samples, measured=resolved.measured, **_facts(plan, prepared))
    arms = [(arm, seed) for seed in plan.seeds for arm in ((UNTRAINED,) if plan.untrained else ()) + plan.arms]
    for number, (name, seed) in enumerate(arms, start=1):
        _say(f"{name}, seed {seed} ({number} of {len(arms)})")
        if name == UNTRAINED:
            arm = _untrained(plan, seed, tasks, directory)
        else:
            arm = dataclasses.replace(_trained(result, name, seed, prepared, tasks), modules=modules[seed][name])
        result = dataclasses.replace(result, arms=(*result.arms, arm))
        if dist.world().is_main:
            save_study(result)
    _say("report")
    path = write_report(result, tasks[0])
    if dist.world().is_main:
        print_table(result, Console())
        console.print(f"The report is '{path}'.")
    return result


def open_data(plan: Plan, directory: Path) -> Prepared:
    """Return the training data: the plan's prepared folder, or its shards prepared inside the study's folder.

    Raises:
        UserError: the data cannot be used.
    """
    if plan.source is None:
        return open_prepared(Path(plan.data.path))
    out = directory / "data"
    if dist.world().is_main and not out.exists():
        source = plan.source
        prepare(
            PrepareConfig(
                source=locate(source.path),
                out=out,
                captions=source.captions,
                label=source.label,
                tokenizer=source.tokenizer,
                vocab_size=source.vocab_size,
                images_only=source.images_only,
            )
        )
    dist.barrier()
    return open_prepared(out)


def check_same_start(plan: Plan, prepared: Prepared, seed: int) -> dict[str, dict[str, int]]:
    """Build every arm before the first one trains: each must be possible, and start from the same encoder.

    Returns:
        arm -> part of the method -> parameters that it trains.

    Raises:
        UserError: an arm cannot be built on the data.
        RuntimeError: a method does not leave the shared encoder's initial weights alone.
    """
    expected = weights_hash(initial_encoder(plan, seed))
    modules = {}
    for arm in plan.arms:
        method = build(plan.run(arm, seed, plan.train.batch), Corpus.of(data_of(plan, arm, prepared)))
        modules[arm] = _trained_parameters(method)
        found = weights_hash(method.encoder)
        if found != expected:
            raise RuntimeError(
                f"{arm} changes the initial encoder ({found} instead of {expected} under seed {seed}), so the study "
                f"would not be like for like: its init_weights must leave the encoder to Encoder.init_weights."
            )
    return modules


def _trained_parameters(method: Method) -> dict[str, int]:
    """Return how many parameters each direct part of `method` trains; parts that train none are left out."""
    found: dict[str, int] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            found[part] = found.get(part, 0) + parameter.numel()
    return found


def initial_encoder(plan: Plan, seed: int) -> Encoder:
    """Return the encoder that every arm starts from under `seed`."""
    encoder = Encoder(plan.encoder)
    encoder.init_weights(key(seed, 0, "init"))
    return encoder


def _claim(directory: Path, plan: Plan) -> None:
    """Write plan.json, or make sure that the one there is the same plan."""
    path = directory / "plan.json"
    if path.exists():
        if read_json(path) != to_dict(plan):
            raise UserError(f"'{directory}' holds the study of another plan: choose another --out, or remove it.")
    elif dist.world().is_main:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(plan))
    dist.barrier()


def _facts(plan: Plan, prepared: Prepared) -> dict[str, Any]:
    device = pick_device(plan.train.device)
    return {
        "versions": {"python": platform.python_version()}
        | {name: str(import_module(name).__version__) for name in LIBRARIES}
        | {"system": platform.platform()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "data": {
            "folder": str(prepared.directory),
            "hash": prepared.hash(),
            "classes": len(prepared.classes),
            **prepared.statistics,
        },
    }


def _say(what: str) -> None:
    if dist.world().is_main:
        console.rule(what, align="left")


def _untrained(plan: Plan, seed: int, tasks: Sequence[Task], directory: Path) -> Arm:
    encoder = initial_encoder(plan, seed)
    arm = Arm(UNTRAINED, seed, "untrained", weights_hash(encoder))

    def view() -> View:
        preprocess = Preprocess(plan.encoder.img_size, plan.encoder.normalization)
        return _computing(View(UNTRAINED, encoder.to(pick_device(plan.train.device)), preprocess), plan.train)

    folder = directory / arm.folder
    if not (folder / "log.jsonl").exists():
        line = {"samples": 0, "flops": 0.0, **_probe(view(), probe_task(tasks[0]))}
        if dist.world().is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        dist.barrier()
    return dataclasses.replace(arm, results=_evaluated(view, tasks, folder))


def _trained(result: StudyResult, name: str, seed: int, prepared: Prepared, tasks: Sequence[Task]) -> Arm:
    plan = result.plan
    run = plan.run(name, seed, result.samples[name])
    kind: Kind = "method" if name in plan.methods else "reference"
    arm = Arm(name, seed, kind, initial_encoder="", run=to_dict(run))
    folder = result.path(arm)
    summary = pretrain(run, data_of(plan, name, prepared), folder, online_probe(plan.train, name, tasks[0]))

    def view() -> View:
        _, method = load_method(folder)
        return _computing(view_of(method.to(pick_device(plan.train.device)), name), plan.train)

    results = _evaluated(view, tasks, folder)
    return dataclasses.replace(arm, initial_encoder=summary.initial_encoder, summary=summary, results=results)


def online_probe(train: TrainConfig, name: str, task: Task) -> Probe:
    """Return the probe taken while a run trains: k-NN on the validation split of `task`, thinned to be quick."""
    thin = probe_task(task)
    return lambda method: _probe(_computing(view_of(method, name), train), thin)


def probe_task(task: Task) -> Task:
    """Return `task` for the online probe: part of the training split, tested on part of the validation split."""
    thin = {
        split.name: Split(split.name, split.source.thinned(most))
        for split, most in ((task.train, PROBE_TRAIN), (task.val, PROBE_VAL))
    }
    return dataclasses.replace(task, train=thin["train"], val=thin["val"], test=thin["val"])


def _computing(view: View, train: TrainConfig) -> View:
    """Return `view` in the precision of training, which in a study is the same for every arm."""
    return dataclasses.replace(view, dtype=pick_precision(train.precision, pick_device(train.device)))


def _probe(view: View, task: Task) -> dict[str, float]:
    results = evaluate(view, [task], ["knn"])
    return {f"probe/{r.task}/{r.metric}": r.value for r in results if r.value is not None}


def evaluate_shown(view: View, tasks: Sequence[Task], names: Sequence[str] | None = None) -> list[Result]:
    """Return what `altsight.evals.evaluate` does, under a progress bar."""
    total = len(tasks) * len(STANDARD if names is None else names)
    with progress_bar() as bar:
        task = bar.add_task("evaluation", total=total, note="")
        steps = count()
        results = evaluate(
            view, tasks, names=names, progress=lambda step: bar.update(task, completed=next(steps), note=step)
        )
        bar.update(task, completed=total, note="")
    return results


def _evaluated(view: Callable[[], View], tasks: Sequence[Task], folder: Path) -> tuple[Result, ...]:
    """Return the results of `view` on all tasks, from `folder/results.json` where they are there already."""
    path = folder / "results.json"
    if path.exists():
        return from_dict(read_json(path), Evaluation, str(path)).results
    results = evaluate_shown(view(), tasks)
    if dist.world().is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(Evaluation(tuple(results))))
    dist.barrier()
    return tuple(results)
