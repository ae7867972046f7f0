"""Samples per second of the training step of every demo arm, and of the loader alone: `python -m bench.speed`.

All figures of one table are from one run; compare them with each other, not with another machine's.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from altsight.core.dist import World
from altsight.data.loader import Loader
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared
from altsight.methods.base import Corpus
from altsight.recipes import demo_plan
from altsight.study.plan import locate
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.run import build

STEPS = 30
WARMUP = 10


def prepared_samples(folder: Path) -> Prepared:
    """Prepare the demo's training data."""
    source = demo_plan().source
    assert source is not None
    prepare(PrepareConfig(locate(source.path), folder, source.captions, source.label, vocab_size=source.vocab_size))
    return open_prepared(folder)


def loader_speed(prepared: Prepared, workers: int) -> float:
    """Return samples per second of the loader with the crops of the demo."""
    run = demo_plan().run("clip", 0, 10**9)
    method = build(run, Corpus(prepared.tokenizer, prepared.classes))
    loader = Loader(
        prepared.source, prepared.source.order(0), method.prepare(run.data.crop, run.encoder.img_size), 64, workers
    )
    batches = loader.batches(World(), 0, 64 * (WARMUP + 2 * STEPS))
    for _ in range(WARMUP):
        next(batches)
    start = time.perf_counter()
    seen = sum(len(batch) for batch, _ in batches)
    return seen / (time.perf_counter() - start)


def step_speed(arm: str, prepared: Prepared, folder: Path) -> tuple[float, float]:
    """Return samples per second of training after warm-up, and the share of the time spent waiting for data."""
    plan = demo_plan()
    run = plan.run(arm, 0, plan.train.batch * (WARMUP + STEPS))
    pretrain(run, prepared, folder / arm)
    lines = [line for line in read_log(folder / arm) if "samples_per_s" in line][WARMUP // run.train.log_every :]
    return sum(x["samples_per_s"] for x in lines) / len(lines), sum(x["data_wait"] for x in lines) / len(lines)


def main() -> None:
    """Print the table."""
    title = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    table = Table("what", "samples/s", "data wait", title=title)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepared_samples(folder / "data")
        for arm in demo_plan().arms:
            speed, wait = step_speed(arm, prepared, folder)
            table.add_row(f"train {arm}", f"{speed:.0f}", f"{wait:.1%}")
        for workers in (0, 1, 2):
            table.add_row(f"loader, {workers} workers", f"{loader_speed(prepared, workers):.0f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
