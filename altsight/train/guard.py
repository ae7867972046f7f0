"""The finite check with its flight recorder: a bad step is skipped and its batch kept, many in a row stop the run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from altsight.core.dist import world
from altsight.core.errors import UserError
from altsight.core.types import Batch


class Guard:
    """Looks at the gradient norm of every step.

    directory: where offending batches go. limit: non-finite steps in a row after which the run stops.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.in_a_row = 0

    def accepts(self, norm: Tensor, step: int, batch: Batch, losses: dict[str, Tensor]) -> bool:
        """True if the step may be applied. The norm is the same on all ranks, so all ranks decide alike.

        Raises:
            UserError: `limit` steps in a row were not finite.
        """
        if bool(torch.isfinite(norm)):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        path = self._record(step, batch, losses, norm)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"the gradient was not finite for {self.limit} steps in a row, up to step {step}: the batches are in "
                f"'{path.parent}'; lower --optim.lr, or set --optim.clip-norm or --train.precision fp32."
            )
        return False

    def _record(self, step: int, batch: Batch, losses: dict[str, Tensor], norm: Tensor) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:08d}_rank_{world().rank}.pt"
        record = {
            "tensors": {name: value.cpu() for name, value in batch.tensors.items()},
            "positions": batch.positions,
            "samples": batch.samples,
            "losses": {name: float(value) for name, value in losses.items()},
            "gradient_norm": float(norm),
        }
        torch.save(record, path)
        return path
