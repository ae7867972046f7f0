"""LCL's parts: from patch tokens to a language model's tokens, and the language model that reads text and pictures.

Yang et al. 2024, arXiv 2406.07543 (specification LCL 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.sequence import Markers
from altsight.data.text import Tokenizer
from altsight.nn.init import init_clip_blocks, reset
from altsight.nn.text import LayerNorm, TextEncoder


@dataclass(frozen=True)
class LanguageConfig:
    """Size of the language model; the defaults are those beside ViT-B/16, and 512 wide with 8 heads beside ViT-B/32."""

    width: int = 768
    """Also that of the space in which pictures and contexts are compared."""
    heads: int = 12
    """Heads of its layers and of the pooling: width / 64 in all models of the source."""
    layers: int = 12


class LanguageModel(nn.Module):
    """A causal transformer over embedded tokens, CLIP's text tower without its end. Call `init_weights` before use.

    Every token sees what precedes it and nothing else, those of one picture included.

    Raises:
        UserError: the width is not divisible by the number of heads.
    """

    def __init__(self, config: LanguageConfig, vocab_size: int, length: int) -> None:
        super().__init__()
        if config.width % config.heads:
            raise UserError(
                f"the language model's width {config.width} is not divisible by its {config.heads} heads: change "
                "--method.language.width or --method.language.heads."
            )
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(config.layers)
        )

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`, with CLIP's standard deviations (specification A1)."""
        with torch_seeded(at):
            reset(self)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            init_clip_blocks(self.blocks, self.config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states (B, T, W) after the last layer, before any norm, of embedded tokens (B, T, W)."""
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        return x


class NormedMap(nn.Module):
    """A head: its own layer norm, then a linear map without a bias."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.map = nn.Linear(width, out, bias=False)

    def init_weights(self, at: Key, std: float | None = None) -> None:
        """Set every parameter from `at`: the map N(0, std), or as PyTorch does."""
        with torch_seeded(at):
            reset(self)
            if std is not None:
                nn.init.normal_(self.map.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) from (..., width)."""
        return self.map(self.norm(x))


class Project(nn.Module):
    """Patch tokens -> the tokens that the language model reads and, with `pool`, the vector of the whole image.

    Both come out of the same values through the same output map: the vector is, head by head, a weighted mean of the
    very values behind the tokens. No residual, no positions. Call `init_weights` before use.
    """

    def __init__(self, width: int, out: int, heads: int, pool: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.value = nn.Linear(width, out)
        self.out = nn.Linear(out, out, bias=False)
        self.attention = _OneQuery(width, out, heads) if pool else None

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: the query N(0, 1), the maps as PyTorch does [unconfirmed]."""
        with torch_seeded(at):
            reset(self)
            if self.attention is not None:
                nn.init.normal_(self.attention.query)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (tokens (n, L, out), pooled vector (n, out) or None) of patch tokens (n, L, width)."""
        values = self.value(self.norm(patches))
        pooled = None if self.attention is None else self.out(self.attention(patches, values))
        return self.out(values), pooled


class _OneQuery(nn.Module):
    """Attention of a single learned query; the values are given."""

    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # A matrix of one row, not a vector: it decays as matrices do.
        self.query = nn.Parameter(torch.empty(1, width))
        self.query_norm, self.key_norm = LayerNorm(width), LayerNorm(width)
        self.query_map, self.key_map = nn.Linear(width, out), nn.Linear(width, out)
        # Softmax does not see what all keys share: the gradient of these two is zero, and would be rounding noise.
        for bias in (self.key_norm.bias, self.key_map.bias):
            bias.requires_grad_(False)

    def forward(self, patches: Tensor, values: Tensor) -> Tensor:
        """Return the weighted means (n, out) of values (n, L, out)."""
        query = self.query_map(self.query_norm(self.query)).expand(patches.shape[0], 1, -1)
        q, k, v = (self._split(x) for x in (query, self.key_map(self.key_norm(patches)), values))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ContextReader(TextEncoder):
    """Text -> the vector that a picture after it is matched with (specification LCL 2.5, end).

    The language model reads <start> and the text, and <start of image> in place of <end>; the vector is the context
    head's there. It has no weights of its own: those of the two belong to the method, and are saved with it once.
    """

    def __init__(
        self, language: LanguageModel, head: NormedMap, tokenizer: Tokenizer, markers: Markers, context: int
    ) -> None:
        super().__init__()
        self.tokenizer, self.start_of_image, self.context = tokenizer, markers.start_of_image, context
        self._lent = (language, head)  # in a tuple, where PyTorch does not look for submodules

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return ids (n, context) of `texts` on the CPU, each with <start of image> as its last; long ones are cut."""
        ids = self.tokenizer.encode_all(texts, self.context)
        # The *first* end is the text's own: others are padding, in vocabularies that pad with the end.
        end = (ids == self.tokenizer.end).int().argmax(dim=-1, keepdim=True)
        return ids.scatter(1, end, self.start_of_image)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the un-normalised context vectors (B, W) at <start of image> in ids (B, T)."""
        language, head = self._lent
        states = language(language.token_embedding(ids))
        at = (ids == self.start_of_image).int().argmax(dim=-1)
        return head(states[torch.arange(ids.shape[0], device=ids.device), at])
