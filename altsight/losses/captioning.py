"""Next-token cross-entropy over captions; every caption counts by its number of tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_IGNORED = -100


def next_token_ce_sum(logits: Tensor, ids: Tensor, end: int) -> Tensor:
    """Return the summed cross-entropy of predicting `ids[:, 1:]` (0-d, fp32).

    What follows a caption's first end token is padding and is no target, whatever the id of the padding: tokenizers
    that pad with the end token (CLIP's) still teach the decoder to stop.

    Args:
        logits: (B, T - 1, V), computed from `ids[:, :-1]`.
        ids: (B, T) start, caption, end, padding.
        end: id of the end token.
    """
    targets = ids[:, 1:].masked_fill(~_is_target(ids, end), _IGNORED)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum")


def target_count(ids: Tensor, end: int) -> Tensor:
    """Return the number of tokens in `ids` (B, T) that `next_token_ce_sum` predicts (0-d int64)."""
    return _is_target(ids, end).sum()


def _is_target(ids: Tensor, end: int) -> Tensor:
    """(B, T - 1) bool: no end token before the target."""
    return (ids == end).cumsum(dim=1)[:, :-1] == 0
