"""CoCa's decoder in two halves: text alone, whose last token is the text embedding, then text that sees the image.

Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models" (specification A4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.text import Tokenizer
from altsight.nn.caption import Attention, is_text
from altsight.nn.init import fill, normal, reset
from altsight.nn.text import LayerNorm, TextEncoder


@dataclass(frozen=True)
class CoCaDecoderConfig:
    """Size of the decoder; the defaults are CoCa-Base's. Large: width 1024, 16 heads."""

    unimodal_layers: int = 12
    """Causal layers over the text alone."""
    multimodal_layers: int = 12
    """Layers in which the text looks at the image too."""
    width: int = 768
    heads: int = 12
    length: int = 76
    """Longest text in tokens, start and end included. [unconfirmed]: open_clip's."""


class _Layer(nn.Module):
    """Pre-norm self-attention, with `cross` attention to the image, and an MLP."""

    def __init__(self, config: CoCaDecoderConfig, cross: bool) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.norm1, self.attention = LayerNorm(width), Attention(width, heads)
        self.cross_norm = LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.norm2, self.mlp = LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, mask, causal=mask is None)
        if self.cross is not None and self.cross_norm is not None:
            assert image is not None
            x = x + self.cross(self.cross_norm(x), image)
        return x + self.mlp(self.norm2(x))


class UnimodalText(TextEncoder):
    """The text half: causal layers over the tokens and a CLS token at their end. Call `init_weights` before use.

    `states` serves both losses in one pass; `forward` is the text embedding alone.

    Raises:
        UserError: the text has no room for a word.
    """

    def __init__(self, config: CoCaDecoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if config.length < 3:
            raise UserError(
                f"a text of {config.length} tokens has no room for a start, a word and an end: raise "
                "--method.decoder.length to 3 or more."
            )
        self.tokenizer, self.context = tokenizer, config.length
        self.token_embedding = nn.Embedding(tokenizer.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.length, config.width))
        self.cls = nn.Parameter(torch.empty(config.width))
        self.layers = nn.ModuleList(_Layer(config, cross=False) for _ in range(config.unimodal_layers))
        self.norm = LayerNorm(config.width)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps and embeddings N(0, 0.02), biases 0. [unconfirmed]"""
        with torch_seeded(at):
            reset(self)
            fill(self, normal, (nn.Linear, nn.Embedding))
            for table in (self.positional_embedding, self.cls):
                normal(table)

    def states(self, ids: Tensor) -> Tensor:
        """Return (B, T + 1, W) for ids (B, T): the states of the tokens, then that of the CLS token.

        A token sees those before it. The CLS token sees all of them but padding, and no token sees the CLS token.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = torch.cat([x, self.cls.to(x.dtype).expand(x.shape[0], 1, -1)], dim=1)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = causal.repeat(ids.shape[0], 1, 1)
        mask[:, -1, :-1] = is_text(ids, self.tokenizer.end)
        for layer in self.layers:
            x = layer(x, mask.unsqueeze(1))
        return x

    def embedding(self, states: Tensor) -> Tensor:
        """Return the text embedding (B, W) from `states`."""
        return self.norm(states[:, -1])

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(self.states(ids))


class MultimodalText(nn.Module):
    """The other half: states of text tokens, without CLS, and image tokens -> next-token logits.

    Embedding and output are two maps; only so has the decoder of CoCa-Base the 297 million parameters of the paper.
    Call `init_weights` before use.
    """

    def __init__(self, config: CoCaDecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, cross=True) for _ in range(config.multimodal_layers))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab_size, bias=False)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps N(0, 0.02), biases 0. [unconfirmed]"""
        with torch_seeded(at):
            reset(self)
            fill(self, normal, (nn.Linear, nn.Embedding))

    def forward(self, states: Tensor, image: Tensor) -> Tensor:
        """Return logits (B, T, V) from states (B, T, W) and image tokens (B, S, W)."""
        for layer in self.layers:
            states = layer(states, image=image)
        return self.head(self.norm(states))
