"""DenseCLIP's context decoder: vectors that look at an image's tokens (Rao et al. 2022; specification 7.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.rng import Key, torch_seeded
from altsight.nn.init import fill, reset, truncated
from altsight.nn.text import LayerNorm

WIDTH, HEADS = 256, 4


class ContextAttention(nn.Module):
    """Multi-head attention from x to a memory, without biases on queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        flat = (self.query(x), self.key(memory), self.value(memory))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in flat)
        return self.dropout(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class ContextLayer(nn.Module):
    """Self-attention, attention to the memory and a feed-forward, each behind a norm and added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(3))
        self.own, self.cross = (ContextAttention(width, heads, dropout) for _ in range(2))
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        own = self.norms[0](x)
        x = x + self.own(own, own)
        x = x + self.cross(self.norms[1](x), memory)
        return x + self.mlp(self.norms[2](x))


class ContextDecoder(nn.Module):
    """Queries (B, Q, width_query) and memory (B, S, width_memory) -> (B, Q, width_query).

    Call `init_weights` before use.

    layers: 3 in all released settings of DenseCLIP, 6 in its text.
    """

    def __init__(self, width_query: int, width_memory: int, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.memory = nn.Sequential(LayerNorm(width_memory), nn.Linear(width_memory, WIDTH), LayerNorm(WIDTH))
        self.queries = nn.Sequential(LayerNorm(width_query), nn.Linear(width_query, WIDTH))
        self.layers = nn.ModuleList(ContextLayer(WIDTH, HEADS, dropout) for _ in range(layers))
        self.out = nn.Sequential(LayerNorm(WIDTH), nn.Linear(WIDTH, width_query))

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: N(0, 0.02) for the maps, biases 0."""
        with torch_seeded(at):
            reset(self)
            fill(self, truncated)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.queries(queries), self.memory(memory)
        for layer in self.layers:
            x = layer(x, memory)
        return self.out(x)
