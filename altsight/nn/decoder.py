"""Decoders that a pre-training throws away afterwards: pixels (MAE) and captions (MUG)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.encoder import Encoder
from altsight.nn.init import fill, reset, sincos_2d
from altsight.nn.text import LayerNorm


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Size of MAE's decoder; the defaults are the paper's."""

    width: int = 512
    depth: int = 8
    heads: int = 16


class PixelDecoder(nn.Module):
    """MAE's decoder (He et al. 2022; specification B1): visible tokens -> pixels of every patch.

    Call `init_weights` before use.

    Raises:
        UserError: the width does not fit the heads or the sine-cosine positions.
    """

    def __init__(self, config: PixelDecoderConfig, encoder: Encoder) -> None:
        super().__init__()
        width = config.width
        if width % config.heads or width % 4:
            raise UserError(
                f"the pixel decoder's width {width} must be divisible by 4 and by its {config.heads} heads: change "
                "--method.decoder.width or --method.decoder.heads."
            )
        self.grid, self.prefix, self.num_patches = encoder.grid, encoder.prefix, encoder.num_patches
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, self.prefix + self.num_patches, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, config.heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, encoder.patch_size**2 * 3)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: Xavier maps, mask token N(0, 0.02), fixed positions (0 for prefix tokens)."""
        with torch_seeded(at), torch.no_grad():
            reset(self)
            fill(self, nn.init.xavier_uniform_)
            nn.init.normal_(self.mask_token, std=0.02)
            self.positions.zero_()
            self.positions[0, self.prefix :] = sincos_2d(self.positions.shape[-1], self.grid)

    def forward(self, tokens: Tensor, keep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the predicted pixels (B, L, patch * patch * 3) of all patches, in image order.

        Args:
            tokens: (B, prefix + K, D) encoded visible tokens, the prefix (CLS, registers) first.
            keep: (B, K) which patch each of the K tokens is.
            grid: rows and columns of the patches; None: those of the encoder's full images. The positions of another
                grid are resampled, as the encoder's are.
        """
        rows, columns = grid or self.grid
        x = self.embed(tokens)
        at = keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        hidden = self.mask_token.to(x.dtype).expand(len(x), rows * columns, -1)
        patches = hidden.scatter(1, at, x[:, self.prefix :])
        positions = resample_abs_pos_embed(self.positions, [rows, columns], list(self.grid), self.prefix)
        x = torch.cat([x[:, : self.prefix], patches], dim=1) + positions
        x = self.norm(self.blocks(x))
        return self.pixels(x[:, self.prefix :])


@dataclass(frozen=True)
class CaptionDecoderConfig:
    """The caption decoder of MUG. What its paper's text and demo leave open is marked [unconfirmed]."""

    width: int | None = None
    """None: the encoder's width. [unconfirmed] for encoders other than ViT-B, where both are 768."""
    unimodal_layers: int = 6
    """Causal layers over the text alone. [unconfirmed]"""
    multimodal_layers: int = 6
    """Layers in which the text looks at the image. [unconfirmed]"""
    heads: int = 8
    """Query heads; keys and values have one head. [unconfirmed]"""
    head_dim: int = 64
    ff_mult: int = 4
    cross_attentions: int = 2
    """Cross-attentions in a multimodal layer. [unconfirmed]: at least two are named by the demo."""
    self_attention_in_multimodal: bool = False
    """CoCa's causal self-attention before the cross-attentions. [unconfirmed]: Algorithm 1 names none."""
    feed_forward_in_multimodal: bool = True
    """SwiGLU beside every cross-attention. [unconfirmed]: optional in CoCa's block."""
    norm_image: bool = False
    """Layer norm of the image tokens before keys and values. [unconfirmed]: likewise."""
    tie_embeddings: bool = True
    """Token embedding and output map share their weight. [unconfirmed]: CoCa ties them."""
    length: int = 40
    """Longest caption in tokens, start and end included. [unconfirmed]"""


class CaptionDecoder(nn.Module):
    """MUG's text decoder (arXiv 2301.07088; specification 1.4): causal text layers, then cross-attention to an image.

    The layers are CoCa's (Yu et al. 2022): bias-free, pre-norm, attention and SwiGLU in parallel, multi-query
    attention, rotary positions. Call `init_weights` before use.
    """

    def __init__(self, config: CaptionDecoderConfig, vocab_size: int, latent_width: int) -> None:
        super().__init__()
        width = config.width or latent_width
        self.embedding = nn.Embedding(vocab_size, width)
        layers: list[nn.Module] = [_SelfLayer(config, width) for _ in range(config.unimodal_layers)]
        for _ in range(config.multimodal_layers):
            if config.self_attention_in_multimodal:
                layers.append(_SelfLayer(config, width))
            layers += [_CrossLayer(config, width, latent_width) for _ in range(config.cross_attentions)]
        self.layers = nn.ModuleList(layers)
        self.norm = LayerNorm(width, bias=False)
        self.head = None if config.tie_embeddings else nn.Linear(width, vocab_size, bias=False)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: embedding N(0, 0.02), the maps as PyTorch does."""
        with torch_seeded(at):
            reset(self)
            nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, latent: Tensor) -> Tensor:
        """Return next-token logits (B, T, V) for `ids` (B, T), given image tokens `latent` (B, S, D)."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, latent)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)


class _SelfLayer(nn.Module):
    """Causal multi-query self-attention and SwiGLU side by side, out of one fused map; the residual is outside."""

    def __init__(self, config: CaptionDecoderConfig, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner, hidden = config.heads * config.head_dim, config.ff_mult * width
        self.sizes = [inner, config.head_dim, config.head_dim, 2 * hidden]
        self.norm = LayerNorm(width, bias=False)
        self.fused = nn.Linear(width, sum(self.sizes), bias=False)
        self.attention_out = nn.Linear(inner, width, bias=False)
        self.feed_forward_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        q, k, v, ff = self.fused(self.norm(x)).split(self.sizes, dim=-1)
        q = rotary(q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2))
        attended = _attend(q, rotary(k.unsqueeze(1)), v.unsqueeze(1), causal=True)
        return self.attention_out(attended) + self.feed_forward_out(_swiglu(ff))


class _CrossLayer(nn.Module):
    """Multi-query attention from text to image tokens and SwiGLU side by side; the residual is outside."""

    def __init__(self, config: CaptionDecoderConfig, width: int, latent_width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner = config.heads * config.head_dim
        hidden = config.ff_mult * width if config.feed_forward_in_multimodal else 0
        self.norm = LayerNorm(width, bias=False)
        self.image_norm = LayerNorm(latent_width, bias=False) if config.norm_image else None
        self.fused = nn.Linear(width, inner + 2 * hidden, bias=False)
        self.key_value = nn.Linear(latent_width, 2 * config.head_dim, bias=False)
        self.attention_out = nn.Linear(inner, width, bias=False)
        self.feed_forward_out = nn.Linear(hidden, width, bias=False) if hidden else None

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        inner = self.heads * self.head_dim
        fused = self.fused(self.norm(x))
        q, ff = fused[..., :inner], fused[..., inner:]
        latent = latent if self.image_norm is None else self.image_norm(latent)
        k, v = self.key_value(latent).unsqueeze(1).chunk(2, dim=-1)
        attended = _attend(q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), k, v, causal=False)
        out: Tensor = self.attention_out(attended)
        return out if self.feed_forward_out is None else out + self.feed_forward_out(_swiglu(ff))


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attend with queries (B, heads, T, d) to the one shared head k, v (B, 1, S, d); return (B, T, heads * d)."""
    shape = (-1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k.expand(shape), v.expand(shape), is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotary(x: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x (..., T, d) by t / 10000^(2i / d) at place t (Su et al. 2021), in fp32."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rate = 10000 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32).unsqueeze(1) * rate
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :half].float(), x[..., half:].float()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
