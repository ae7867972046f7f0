"""Text encoders of dual encoders: CLIP's causal transformer, and the bidirectional ones of FLIP and SigLIP.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (specification
A1), and its published code for the initialisation; specification A5 and A7 for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.text import Tokenizer
from altsight.nn.init import init_clip_blocks, reset


@dataclass(frozen=True)
class TextConfig:
    """Size of the text tower; the defaults are those of CLIP ViT-B."""

    width: int = 512
    heads: int = 8
    layers: int = 12
    context: int = 77
    """Longest text in tokens, start and end included; the cost of the tower grows with it."""
    quick_gelu: bool = True
    """x * sigmoid(1.702 x) instead of the exact GELU (OpenAI's CLIP)."""
    tanh_gelu: bool = False
    """GELU by its tanh formula instead of the exact one (SigLIP's published weights)."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layers, in widths of the tower."""
    norm_eps: float = 1e-5
    """Added to the variance in the layer norms (SigLIP: 1e-6)."""
    causal: bool = True
    """False: every token sees every other, padding included (FLIP, SigLIP)."""
    pool: Literal["end", "first", "last"] = "end"
    """Token whose state is the feature: the end token (CLIP), the first (FLIP), or the last of the context (SigLIP)."""
    pad_with_end: bool = False
    """Fill the context with end tokens, so that the last token always is one (SigLIP)."""
    projection_bias: bool = False
    """The map to the joint space has a bias (SigLIP)."""


class TextEncoder(nn.Module):
    """Base of what reads text in a dual encoder: token ids (B, context) -> un-normalised joint features (B, E)."""

    tokenizer: Tokenizer
    context: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids (n, context) of `texts`, as `forward` wants them, on the CPU."""
        return self.tokenizer.encode_all(texts, self.context)


class LayerNorm(nn.LayerNorm):
    """Layer norm that is always evaluated in fp32; returns the dtype it was given."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class TextTower(TextEncoder):
    """Token ids -> features in the joint space. Call `init_weights` before use.

    Args:
        config: the size.
        tokenizer: sets the vocabulary and which id is the end token.
        embed_dim: width of the joint space.
        vocabulary: rows of the table of tokens; 0: as many as the tokenizer has ids.

    Raises:
        UserError: the width is not divisible by the number of heads, or the context has no room for a text.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, embed_dim: int, vocabulary: int = 0) -> None:
        super().__init__()
        if config.width % config.heads:
            raise UserError(
                f"the text tower's width {config.width} is not divisible by its {config.heads} heads: "
                "change --method.text.width or --method.text.heads."
            )
        if config.context < 3:
            raise UserError(
                f"a text context of {config.context} has no room for a start, a word and an end: raise "
                "--method.text.context to 3 or more."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.context = config.context
        self.token_embedding = nn.Embedding(vocabulary or tokenizer.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        norm: Any = partial(LayerNorm, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.mlp_ratio,
                qkv_bias=True,
                act_layer=_activation(config),
                norm_layer=norm,
            )
            for _ in range(config.layers)
        )
        self.ln_final = norm(config.width)
        self.text_projection = nn.Linear(config.width, embed_dim, bias=config.projection_bias)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`, with CLIP's standard deviations (specification A1)."""
        with torch_seeded(at):
            reset(self)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            init_clip_blocks(self.blocks, self.config.width)
            nn.init.normal_(self.text_projection.weight, std=self.config.width**-0.5)
            if self.text_projection.bias is not None:
                nn.init.zeros_(self.text_projection.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of two dimensions that do not decay: the position table."""
        return {"positional_embedding"}

    def forward(self, ids: Tensor) -> Tensor:
        """Return the un-normalised joint features (B, embed_dim) of texts (B, T), T <= context.

        Under causal attention what follows the end token is never seen, and padding needs no mask.
        """
        ids = self.filled(ids)
        return self.read(self.token_embedding(ids), self.place(ids))

    def read(self, embedded: Tensor, place: Tensor) -> Tensor:
        """Return the features of texts whose tokens are embedded already (B, T, W), read at token `place` (B,) of each.

        Prompts that are learned have embeddings, and no ids.
        """
        x = embedded + self.positional_embedding[: embedded.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=self.config.causal)
        # The final norm acts on each token alone, so only the one that is read has to pass through it.
        return self.text_projection(self.ln_final(x[torch.arange(x.shape[0], device=x.device), place]))

    def filled(self, ids: Tensor) -> Tensor:
        """Return texts (B, T) with end tokens for padding, where the tower was trained so."""
        if not self.config.pad_with_end:
            return ids
        after = (ids == self.tokenizer.end).cumsum(dim=-1) > 0
        return ids.masked_fill(after, self.tokenizer.end)

    def place(self, ids: Tensor) -> Tensor:
        """Return which token of each text (B, T) is the feature, (B,)."""
        if self.config.pool == "end":
            # The *first* end token, found by id, so that a padding id equal to the end id is harmless.
            return (ids == self.tokenizer.end).int().argmax(dim=-1)
        return ids.new_full((ids.shape[0],), 0 if self.config.pool == "first" else ids.shape[1] - 1)


def _activation(config: TextConfig) -> type[nn.Module]:
    if config.quick_gelu:
        return QuickGELU
    return GELUTanh if config.tanh_gelu else nn.GELU
