"""Train one method: `resume_worker.py METHOD DATA OUT SAMPLES EVERY`; the resume test kills it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from altsight.data.prepared import open_prepared
from altsight.train.loop import pretrain
from tests.contract.tiny import tiny_run

if __name__ == "__main__":
    method, data, out, samples, every = sys.argv[1:]
    torch.set_num_threads(1)
    run = tiny_run(method, Path(data), int(samples), batch=16, checkpoint_every=int(every))
    pretrain(run, open_prepared(Path(data)), Path(out))
