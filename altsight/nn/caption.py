"""What caption decoders have in common: attention that looks elsewhere, post-norm layers, and greedy writing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.data.text import Tokenizer
from altsight.nn.text import LayerNorm

_UNWRITTEN = ("[UNK]", "<unk>", "[MASK]", "<mask>")
"""Tokens that stand for no text, where a known tokenizer has them."""


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


Continue = Callable[[Tensor], Tensor]
"""Ids (B, T) of captions so far -> logits (B, V) of their next token."""


@torch.no_grad()
def greedy(step: Continue, tokenizer: Tokenizer, prefix: Tensor, max_length: int) -> Tensor:
    """Continue `prefix` (B, T) with the likeliest token at a time: (B, up to max_length) ids.

    Stops when every row has reached the end token; rows that reached it earlier repeat it. Padding, start and what
    stands for no text are never written, as in MUG's demo (specification MUG 1.9). The prefix is computed anew for
    each token: captions are short.
    """
    unwritten = [tokenizer.model.token_to_id(name) for name in _UNWRITTEN]
    banned = [token for token in {tokenizer.pad, tokenizer.start, *unwritten} - {None} if token != tokenizer.end]
    ids = prefix
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < max_length and not done.all():
        logits = step(ids).float()
        logits[:, banned] = -torch.inf
        token = logits.argmax(dim=-1).masked_fill(done, tokenizer.end)
        ids = torch.cat([ids, token.unsqueeze(1)], dim=1)
        done |= token == tokenizer.end
    return ids


def write(step: Continue, tokenizer: Tokenizer, images: Tensor, prefix: str, max_length: int) -> list[str]:
    """Return the greedy caption of each of `images` (B, ...) that starts with the words `prefix`.

    max_length: longest caption in tokens, start and end included.
    """
    words = tokenizer.model.encode(prefix, add_special_tokens=False).ids
    start = torch.tensor([tokenizer.start, *words][:max_length], device=images.device)
    ids = greedy(step, tokenizer, start.expand(len(images), -1), max_length)
    return [tokenizer.decode(row) for row in ids.tolist()]
