"""One rank of the test of ranks: `torchrun rank_worker.py FOLDER` trains into FOLDER/NAME-RANKS what it finds there."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from altsight.core import dist
from altsight.transfer.finetune import Finetune
from altsight.transfer.linear_probe import LinearProbe
from tests.transfer.test_finetune import FIT, QUICK, TINY, view_of


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    place = dist.start(torch.device("cpu"))
    shared: dict[str, Any] = {
        "data": str(folder / "train"),
        "test": str(folder / "test"),
        "fit": dataclasses.replace(FIT, epochs=3),
    }
    transfers = {
        "finetune": Finetune(**shared, optim=QUICK["optim"], drop_path=0.0),
        "features": LinearProbe(**shared),
        "crops": LinearProbe(**shared, augment=True),
    }
    for name, transfer in transfers.items():
        results = transfer(view_of(TINY), folder / f"{name}-{place.size}")
        if place.is_main:
            print(name, [(result.metric, result.value) for result in results])
    dist.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
