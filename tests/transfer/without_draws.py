"""altsight's command line with nothing drawn inside of networks: dropout, stochastic depth, the sampling of regions.

What is drawn there is keyed by the first sample of a rank's part, and so differs with the number of ranks. All else
must not.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from altsight.cli import main


def _same(self: nn.Module, x: Tensor) -> Tensor:
    return x


def _in_order(n: int, **kwargs: Any) -> Tensor:
    return torch.arange(n, device=kwargs.get("device"))


if __name__ == "__main__":
    for kind in (nn.Dropout, nn.Dropout2d, timm.layers.DropPath):
        kind.forward = _same  # type: ignore[method-assign,assignment]
    torch.randperm = _in_order  # type: ignore[assignment]
    main()
