"""One rank of the gradient test: `torchrun rank_worker.py DATA OUT [METHOD ...]` writes what every method computed.

Rank 0 writes, per method and micro-batch size, the gradients of one global batch, the losses summed over ranks and
the samples that all ranks saw.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from altsight.core import dist
from altsight.core.types import Batch
from altsight.data.loader import Loader
from altsight.data.prepared import open_prepared
from altsight.methods import METHODS
from altsight.methods.base import Corpus
from altsight.train.accumulate import Accumulator
from altsight.train.parallel import parallelize
from altsight.train.run import build
from tests.contract.tiny import tiny_run

GLOBAL_BATCH = 16


def _seen(batch: Batch) -> list[tuple[int, int]]:
    """Return (position, sample) of every sample in the batch."""
    return list(zip(batch.positions.tolist(), batch.samples.tolist(), strict=True))


def main(data: Path, out: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    prepared = open_prepared(data)
    place = dist.start(torch.device("cpu"))
    results = {}
    for name in names:
        for micro in (0, 2):
            run = tiny_run(name, data, samples=64, batch=GLOBAL_BATCH)
            method = build(run, Corpus(prepared.tokenizer, prepared.classes))
            loader = Loader(
                prepared.source,
                prepared.source.order(0),
                method.prepare(run.data.crop, run.encoder.img_size),
                GLOBAL_BATCH,
            )
            batch, _ = next(iter(loader.batches(place, GLOBAL_BATCH, 2 * GLOBAL_BATCH)))
            accumulator = Accumulator(method, parallelize(method, False), 0, micro)
            losses, _ = accumulator(batch)
            results[name, micro] = {
                "grads": {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None},
                "losses": {n: float(dist.sum_over_ranks(v)) for n, v in losses.items()},
                "samples": dict(pair for part in dist.gather_objects(_seen(batch)) for pair in part),
            }
    if place.is_main:
        torch.save(results, out)
    dist.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(METHODS))
