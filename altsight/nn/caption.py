"""What caption decoders have in common: where a text ends, attention that looks elsewhere, and post-norm layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.nn.text import LayerNorm


def is_text(ids: Tensor, end: int) -> Tensor:
    """Return (B, T) bool: True from the start of each caption in `ids` to its first end token, False for padding."""
    ends = ids == end
    return ends.cumsum(dim=1) == ends


class Attention(nn.Module):
    """Multi-head attention from one sequence to another, or to itself, with biases and dropout on its weights.

    Keys have no bias: it would add the same to all scores of a query, which the softmax takes out again.

    Raises:
        UserError: the width is not divisible by the number of heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"the text decoder's width {width} is not divisible by its {heads} heads: change one.")
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return (B, T, W) from x (B, T, W) that looks at context (B, S, W).

        mask: bool, broadcast to (B, heads, T, S); True where a query may look. causal: for T = S, without a mask.
        """
        flat = (self.query(x), self.key(context), self.value(context))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in flat)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(seen.transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    """Self-attention, with `cross` attention to a memory, and a feed-forward; a norm after each residual sum.

    Dropout acts on the attention weights, inside the feed-forward and on each branch (Vaswani et al. 2017).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, cross: bool, activation: nn.Module) -> None:
        super().__init__()
        self.self_attention, self.self_norm = Attention(width, heads, dropout), LayerNorm(width)
        self.cross_attention = Attention(width, heads, dropout) if cross else None
        self.cross_norm = LayerNorm(width) if cross else None
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), activation, nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.norm = LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return (B, T, W) from x (B, T, W); mask and causal are those of the self-attention, memory is (B, S, W)."""
        x = self.self_norm(x + self.drop(self.self_attention(x, x, mask, causal)))
        if self.cross_attention is not None and self.cross_norm is not None:
            assert memory is not None
            x = self.cross_norm(x + self.drop(self.cross_attention(x, memory)))
        return self.norm(x + self.drop(self.feed_forward(x)))
