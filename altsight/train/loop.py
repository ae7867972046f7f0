"""The only training loop. It knows nothing of methods beyond their contract."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from altsight.core import dist
from altsight.core.config import read_json, write_json
from altsight.core.errors import UserError
from altsight.core.types import Batch, Progress
from altsight.data.cache import open_cache
from altsight.data.loader import Loader, check_batch
from altsight.data.prepared import Prepared
from altsight.methods.base import Corpus, Method, summary
from altsight.train import checkpoint
from altsight.train.account import flops_per_sample
from altsight.train.accumulate import Accumulator
from altsight.train.curriculum import Curriculum, Stage, full_size, make_curriculum, set_input_size
from altsight.train.folder import claim, describe
from altsight.train.guard import Guard
from altsight.train.log import Log, console
from altsight.train.optim import make_optimizer
from altsight.train.parallel import parallelize, precision
from altsight.train.run import Run, build, check_least_batch, pick_device, pick_precision, weights_hash
from altsight.train.schedule import Schedule
from altsight.train.signals import stop_signals
from altsight.train.state import Meter, State, Summary, peak_memory, sequence_hash

Probe = Callable[[Method], dict[str, float]]
"""An online probe: numbers about the method as it is now, written to the log."""

BAD_GRACE = 1000
"""Samples after which the share of bad samples is looked at."""


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved itself; running it again goes on."""


@dataclass
class _Training:
    """The moving parts of one run on one rank."""

    run: Run[Any]
    method: Method
    optimizer: torch.optim.Optimizer
    accumulator: Accumulator
    guard: Guard
    state: State
    ema: ModelEmaV3 | None
    device: torch.device
    curriculum: Curriculum
    stage: Stage | None = None

    def enter_stage(self, batch: Batch) -> None:
        """Set what holds in the stage of this step, where it has just begun, and count what a sample costs in it."""
        stage = self.curriculum.stage(self.state.step)
        if stage is not self.stage:
            self.stage = stage
            set_input_size(self.method, stage.size)
        if stage.start != self.state.stage:
            self.state.stage = stage.start
            self.state.flops_per_sample = flops_per_sample(self.method, batch.to(self.device))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimizer step on this rank's part of a global batch; return its share of each loss."""
        progress = Progress(self.state.step, self.run.steps)
        self.method.start_step(progress)
        losses, _ = self.accumulator(batch.to(self.device))
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.guard.accepts(norm, self.state.step, batch, losses):
            self._clip(parameters, norm)
            self.optimizer.step()
            self.method.after_step(progress)
            if self.ema is not None:
                self.ema.update(self.method)
        else:
            self.state.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _clip(self, parameters: list[torch.nn.Parameter], norm: Tensor) -> None:
        limit = self.run.optim.clip_norm
        if limit and self.run.optim.clip == "whole":
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        elif limit:
            for parameter in parameters:
                torch.nn.utils.clip_grad_norm_(parameter, limit)

    def tensors(self) -> dict[str, Any]:
        """Return everything with tensors that a checkpoint holds."""
        ema = self.ema.module.state_dict() if self.ema is not None else None
        return {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": ema}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's content."""
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.state = State(**saved["state"])


def pretrain(run: Run[Any], prepared: Prepared, directory: Path, probe: Probe | None = None) -> Summary:
    """Train `run` on `prepared` into `directory`; a directory that holds the same run already goes on where it was.

    Writes run.json, log.jsonl, tensorboard/, checkpoints/, bad_samples.txt, flight/ and, at the end, summary.json.

    Raises:
        UserError: the run cannot be done as asked, or the directory holds another run.
        Stopped: a signal asked for the end; a checkpoint was written.
    """
    return train(run, lambda: build(run, Corpus.of(prepared)), prepared, directory, probe)


def train(
    run: Run[Any], make: Callable[[], Method], prepared: Prepared, directory: Path, probe: Probe | None = None
) -> Summary:
    """Train the method that `make` builds, as `pretrain` does; `run` says how and describes it."""
    device = pick_device(run.train.device)
    place = dist.start(device)
    claim(directory, run)
    if (directory / "summary.json").exists():
        return Summary(**read_json(directory / "summary.json"))
    check_batch(run.train.batch, len(prepared.source), str(prepared.directory))
    if not run.steps:
        raise UserError(
            f"a run of {run.train.samples:,} samples is shorter than one batch of {run.train.batch:,}: raise "
            "--train.samples or lower --train.batch."
        )
    dtype = pick_precision(run.train.precision, device)
    method = make()
    check_least_batch(run, method)
    curriculum = make_curriculum(run.accelerate, method, run.name, run.steps, run.train.batch)
    if place.is_main:
        describe(run, prepared, directory)
    initial = weights_hash(method.encoder)
    training = _assemble(run, method.to(device), curriculum, device, dtype, directory)
    training.state.data = prepared.hash()
    saved = checkpoint.load_latest(directory / "checkpoints", console.print)
    if saved is not None:
        if saved["state"]["data"] != training.state.data:
            raise UserError(
                f"the data in '{prepared.directory}' are not those that the run in '{directory}' began with, so it "
                "cannot go on: put them back, or choose another --out."
            )
        training.restore(saved)
    last = _train(training, prepared, directory, probe, place)
    state = training.state
    done = Summary(
        name=run.name,
        samples_seen=state.samples_seen,
        steps=state.step,
        sample_hash=f"{state.sample_hash % 2**64:016x}",
        initial_encoder=initial,
        bad_samples=state.bad,
        skipped_steps=state.skipped,
        flops=state.flops,
        wall_seconds=state.wall_seconds,
        wait_seconds=state.wait_seconds,
        parameters=summary(method),
        world_size=place.size,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        peak_memory_gb=peak_memory(device),
        data=state.data,
        final_loss=last,
    )
    if place.is_main:
        write_json(directory / "summary.json", asdict(done))
    dist.barrier()
    return done


def _assemble(
    run: Run[Any], method: Method, curriculum: Curriculum, device: torch.device, dtype: torch.dtype, directory: Path
) -> _Training:
    ema = ModelEmaV3(method, decay=run.optim.ema) if run.optim.ema else None
    optimizer = make_optimizer(method, run.optim, run.train.batch)
    model = parallelize(method, run.train.compile)
    context = functools.partial(precision, device, dtype)
    accumulator = Accumulator(method, model, run.train.seed, run.train.micro_batch, context)
    guard = Guard(directory / "flight", run.train.max_skipped)
    return _Training(run, method, optimizer, accumulator, guard, State(), ema, device, curriculum)


def _train(
    training: _Training, prepared: Prepared, directory: Path, probe: Probe | None, place: dist.World
) -> dict[str, float]:
    """Run the loop from `training.state` to the end of the budget; return the last losses that were logged."""
    run, state, method = training.run, training.state, training.method
    schedule = Schedule(training.optimizer, run.optim, run.steps, run.train.batch)
    loader = Loader(
        prepared.source.cached(open_cache(run.data.cache, run.data.cache_gb)),
        prepared.source.order(run.train.seed),
        training.curriculum.prepare(method, run.data.crop),
        run.train.batch,
        run.data.workers,
        pin_memory=training.device.type == "cuda",
        limit=run.data.stall_limit,
        say=console.print,
    )
    method.train()
    meter = Meter(state)
    last: dict[str, float] = {}
    samples = run.steps * run.train.batch
    with stop_signals() as asked, Log(directory, state.samples_seen, run.name, samples) as log:
        for batch, wait in loader.batches(place, state.samples_seen, samples):
            training.enter_stage(batch)
            schedule.update(training.curriculum.progress(state.step))
            losses = training.step(batch)
            _advance(training, batch, wait, directory, meter)
            log.advance(state.samples_seen)
            probed = probe is not None and state.crossed(run.train.batch, run.train.probe_every)
            if probed or state.step % run.train.log_every == 0 or state.samples_seen == samples:
                last = _losses(losses, method)
                line = _line(training, last, meter)
                if probe is not None and probed:
                    line |= _probe(probe, method)
                    meter.restart()
                log.write(line)
                log.advance(state.samples_seen, f"loss {last['loss']:.3f}, wait {line['wait_ms']:.1f} ms")
            stop = dist.any_rank(bool(asked))
            if stop or state.samples_seen == samples or state.crossed(run.train.batch, run.train.checkpoint_every):
                _save(training, directory)
            if stop and state.samples_seen < samples:
                raise Stopped(f"stopped at {state.samples_seen:,} of {samples:,} samples; run it again to go on")
    return last


def _advance(training: _Training, batch: Batch, wait: float, directory: Path, meter: Meter) -> None:
    """Count the batch that was just trained on; stop the run when too many samples had to be replaced."""
    state, run = training.state, training.run
    facts = torch.tensor([len(batch.bad), sequence_hash(batch)], dtype=torch.int64, device=training.device)
    bad, seen = dist.sum_over_ranks(facts).tolist()
    state.step += 1
    state.samples_seen += run.train.batch
    state.sample_hash = (state.sample_hash + seen) % 2**64
    state.bad += bad
    state.flops += state.flops_per_sample * run.train.batch
    meter.tick(state, wait)
    if batch.bad:
        with (directory / "bad_samples.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in batch.bad)
    enough = state.samples_seen >= min(BAD_GRACE, run.steps * run.train.batch)
    if enough and state.bad > run.data.max_bad_fraction * state.samples_seen:
        raise UserError(
            f"{state.bad} of {state.samples_seen} samples had to be replaced, more than --data.max-bad-fraction "
            f"{run.data.max_bad_fraction:g}; they are listed in '{directory / 'bad_samples.txt'}': mend the shards or "
            "raise the limit."
        )


def _losses(losses: dict[str, Tensor], method: Method) -> dict[str, float]:
    """Return the global value of each loss and their weighted sum as `loss`."""
    values = dist.sum_over_ranks(torch.stack([v.float() for v in losses.values()])).tolist()
    named = dict(zip(losses, values, strict=True))
    weights = method.weights()
    return {"loss": sum(weights.get(n, 1.0) * v for n, v in named.items())} | {f"loss/{n}": v for n, v in named.items()}


def _line(training: _Training, losses: dict[str, float], meter: Meter) -> dict[str, float]:
    state = training.state
    return {
        "samples": state.samples_seen,
        "step": state.step,
        **losses,
        **training.method.report(),
        "lr": max(group["lr"] for group in training.optimizer.param_groups),
        "flops": state.flops,
        "seconds": state.wall_seconds,
        "bad": state.bad,
        "skipped": state.skipped,
        **meter.since_last(state),
    }


def _probe(probe: Probe, method: Method) -> dict[str, float]:
    method.eval()
    with full_size(method):
        found = probe(method)
    method.train()
    return found


def _save(training: _Training, directory: Path) -> None:
    if dist.world().is_main:
        content = {**training.tensors(), "state": asdict(training.state)}
        checkpoint.save(directory / "checkpoints", training.state.samples_seen, content, training.run.train.keep)
    dist.barrier()
