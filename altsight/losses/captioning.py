"""Cross-entropies of captions: next tokens, previous tokens, masked tokens, and captions as sets of tokens.

Every caption counts by its number of tokens. What follows a caption's first end token is padding and is no target,
whatever the id of the padding: tokenizers that pad with the end token (CLIP's) still teach the decoder to stop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.losses.tokens import token_ce_sum
from altsight.nn.caption import is_text


def next_token_ce_sum(logits: Tensor, ids: Tensor, end: int) -> Tensor:
    """Return the summed cross-entropy of predicting `ids[:, 1:]` (0-d, fp32).

    Args:
        logits: (B, T - 1, V), computed from `ids[:, :-1]`.
        ids: (B, T) start, caption, end, padding.
        end: id of the end token.
    """
    return token_ce_sum(logits, ids[:, 1:], is_text(ids, end)[:, 1:])


def target_count(ids: Tensor, end: int) -> Tensor:
    """Return the number of tokens in `ids` (B, T) that `next_token_ce_sum` predicts (0-d int64)."""
    return is_text(ids, end)[:, 1:].sum()


def backwards(ids: Tensor, text: Tensor) -> Tensor:
    """Return `ids` (B, T) with each caption, where `text` (B, T) is True, from its end to its start; padding stays.

    Twice is the identity. The reversed captions take the same places, so `text` holds for them too.
    """
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return ids.gather(1, torch.where(text, text.sum(dim=1, keepdim=True) - 1 - place, place))


def token_set_ce_sum(logits: Tensor, ids: Tensor, special: tuple[int, ...]) -> Tensor:
    """Return the cross-entropy of each caption taken as the set of its tokens, summed over captions (0-d, fp32).

    The target is uniform over the different tokens of the caption: -mean log p (VirTex's token classification;
    specification 9.2). A caption without a token counts 0.

    Args:
        logits: (B, V), one prediction an image.
        ids: (B, T).
        special: ids of start, end and padding, which belong to no set.
    """
    target = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids, 1.0)
    target[:, list(special)] = 0
    target = target / target.sum(dim=1, keepdim=True).clamp_min(1)
    return -(target * F.log_softmax(logits.float(), dim=-1)).sum()


def token_set_count(ids: Tensor, special: tuple[int, ...]) -> Tensor:
    """Return the number of captions in `ids` (B, T) with a token that is not `special` (0-d int64)."""
    return (~torch.isin(ids, ids.new_tensor(special))).any(dim=1).sum()
