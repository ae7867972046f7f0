"""CLIP's text tower: a causal transformer whose feature is read at the end token.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (specification
A1), and its published code for the initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.text import Tokenizer
from altsight.nn.encoder import reset


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


class LayerNorm(nn.LayerNorm):
    """Layer norm that is always evaluated in fp32; returns the dtype it was given."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class TextTower(nn.Module):
    """Token ids -> features in the joint space. Call `init_weights` before use.

    Args:
        config: the size.
        tokenizer: sets the vocabulary and which id is the end token.
        embed_dim: width of the joint space.

    Raises:
        UserError: the width is not divisible by the number of heads, or the context has no room for a text.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, embed_dim: int) -> None:
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
        self.token_embedding = nn.Embedding(tokenizer.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                qkv_bias=True,
                act_layer=QuickGELU if config.quick_gelu else nn.GELU,
                norm_layer=LayerNorm,
            )
            for _ in range(config.layers)
        )
        self.ln_final = LayerNorm(config.width)
        self.text_projection = nn.Linear(config.width, embed_dim, bias=False)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`, with CLIP's standard deviations (specification A1)."""
        width = self.config.width
        residual = width**-0.5 * (2 * self.config.layers) ** -0.5
        stds = {
            "attn.qkv.weight": width**-0.5,
            "attn.proj.weight": residual,
            "mlp.fc1.weight": (2 * width) ** -0.5,
            "mlp.fc2.weight": residual,
        }
        with torch_seeded(at):
            reset(self)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            for block in self.blocks:
                for name, std in stds.items():
                    nn.init.normal_(block.get_parameter(name), std=std)
                for name in ("attn.qkv.bias", "attn.proj.bias"):
                    nn.init.zeros_(block.get_parameter(name))
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of two dimensions that do not decay: the position table."""
        return {"positional_embedding"}

    def forward(self, ids: Tensor) -> Tensor:
        """Return the un-normalised joint features (B, embed_dim) of texts (B, T), T <= context.

        The feature is the hidden state at the *first* end token, found by id, so that a padding id equal to the end
        id is harmless. Attention is causal: what follows the end token is never seen, and padding needs no mask.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        end = (ids == self.tokenizer.end).int().argmax(dim=-1)
        # The final norm acts on each token alone, so only the one that is read has to pass through it.
        return self.text_projection(self.ln_final(x[torch.arange(len(ids), device=ids.device), end]))
