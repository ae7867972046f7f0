"""Any weights as a `View`: the folder of a run, or what another library wrote."""

from __future__ import annotations

from pathlib import Path

from altsight.evals.base import View
from altsight.evals.load import load_view as load_run_view


def load_view(source: str, device: str = "auto") -> View:
    """Return the View of the weights at `source`.

    Raises:
        UserError: there are no weights, or none that are known.
    """
    return load_run_view(Path(source), device=device)
