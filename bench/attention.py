"""Training step of the demo's methods with fused and with plain attention, on this CPU: `python -m bench.attention`.

Prints images per second of processor time and the ratio, fp32 and bf16: the reason for `train.parallel.precision`.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from altsight.core.dist import World
from altsight.core.types import Batch
from altsight.data.loader import Loader
from altsight.methods.base import Corpus, Method
from altsight.recipes import demo_plan
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.run import build
from bench.speed import prepared_samples

STEPS = 4


def speed(method: Method, batch: Batch, dtype: torch.dtype, attention: AbstractContextManager[object]) -> float:
    """Return images per second of processor time, forward and backward."""
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    step = Accumulator(method, Embed(method), 0, 0, half)
    with attention:
        step(batch)
        start = time.process_time()
        for _ in range(STEPS):
            step(batch)
        return STEPS * len(batch) / (time.process_time() - start)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table("method", "precision", "fused", "plain", "plain / fused")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepared_samples(Path(folder) / "data")
        for arm in demo_plan().arms:
            run = demo_plan().run(arm, 0, 64)
            method = build(run, Corpus(prepared.tokenizer, prepared.classes))
            loader = Loader(
                prepared.source, prepared.source.order(0), method.prepare(run.data.crop, run.encoder.img_size), 64
            )
            batch, _ = next(loader.batches(World(), 0, 64))
            for dtype in (torch.float32, torch.bfloat16):
                fused = speed(method, batch, dtype, nullcontext())
                plain = speed(method, batch, dtype, sdpa_kernel(SDPBackend.MATH))
                table.add_row(arm, str(dtype), f"{fused:.0f}", f"{plain:.0f}", f"{plain / fused:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
