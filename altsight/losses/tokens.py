"""Cross-entropy over the tokens of patches or of a text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_IGNORED = -100


def token_ce_sum(logits: Tensor, targets: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Return the summed cross-entropy in nats (0-d, fp32; 0 where nothing is wanted).

    Args:
        logits: (..., V), of any floating dtype; the softmax is in fp32.
        targets: (...) int64.
        wanted: (...) bool, False where the place does not count; None: all do.
    """
    if wanted is not None:
        targets = targets.masked_fill(~wanted, _IGNORED)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=_IGNORED, reduction="sum")
