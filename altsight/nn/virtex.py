"""VirTex's text side: one or two shallow transformers that read the image's grid (specification 9.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.rng import Key, torch_seeded
from altsight.nn.caption import PostNormLayer
from altsight.nn.init import fill, normal, reset
from altsight.nn.text import LayerNorm

Reading = Literal["onwards", "backwards", "both ways"]
"""From start to end; from end to start; every token sees every other (masked language modelling)."""


@dataclass(frozen=True)
class TextualHeadConfig:
    """Size of VirTex's head; the defaults are its best model's. Its base model has a width of 1024 and 16 heads."""

    width: int = 2048
    heads: int = 32
    layers: int = 1
    length: int = 30
    """Longest caption in tokens, start and end included."""
    dropout: float = 0.1


class TextualHead(nn.Module):
    """Image grid and tokens -> logits of tokens; one transformer a reading, all else is shared.

    Shared are the projection of the grid, the embeddings of words and positions, and the output, which is tied to the
    words and has a bias of its own. Desai and Johnson 2021 (specification 9.1). Call `init_weights` before use.
    """

    def __init__(
        self, config: TextualHeadConfig, vocab_size: int, grid_width: int, readings: tuple[Reading, ...]
    ) -> None:
        super().__init__()
        width = config.width
        self.projection = nn.Linear(grid_width, width)
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(config.length, width)
        self.norm = LayerNorm(width, eps=1e-8)
        self.drop = nn.Dropout(config.dropout)
        self.transformers = nn.ModuleDict({reading: _Transformer(config) for reading in readings})
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps and embeddings N(0, 0.02), biases 0."""
        with torch_seeded(at):
            reset(self)
            fill(self, normal, (nn.Linear, nn.Embedding))
            nn.init.zeros_(self.bias)

    def forward(self, ids: Tensor, text: Tensor, memory: Tensor, reading: Reading) -> Tensor:
        """Return logits (B, T, V).

        Args:
            ids: (B, T), in the order of `reading`. text: (B, T) bool, False for padding.
            memory: (B, S, W), `projection` of the encoder's patch tokens: one for all readings.
        """
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        x = self.drop(self.norm(x)) * text.unsqueeze(-1)
        # Padding comes last, so only a reading both ways could look at it.
        mask = text[:, None, None, :] if reading == "both ways" else None
        x = self.transformers[reading](x, memory, mask)
        return F.linear(x, self.words.weight, self.bias)


class _Transformer(nn.Module):
    """Layers of one reading: causal, unless a mask says what each token sees."""

    def __init__(self, config: TextualHeadConfig) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.layers = nn.ModuleList(
            PostNormLayer(width, heads, 4 * width, dropout, cross=True, activation=nn.GELU())
            for _ in range(config.layers)
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, mask, causal=mask is None)
        return x
