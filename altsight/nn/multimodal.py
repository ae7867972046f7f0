"""M3AE's decoder: visible patches and words -> all pixels and all words (Geng et al. 2022; specification A8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.decoder import PixelDecoderConfig
from altsight.nn.encoder import Encoder
from altsight.nn.init import fill, reset, sincos_2d
from altsight.nn.text import LayerNorm


def sincos_1d(width: int, length: int) -> Tensor:
    """Return a fixed position table (length, width): sines, then cosines, of position / 10000^(i / (width / 2))."""
    rate = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


class JointDecoder(nn.Module):
    """One transformer over all patches and all words of a pair, those that were not encoded as mask tokens.

    Call `init_weights` before use.

    Raises:
        UserError: the width does not fit the heads or the sine-cosine positions.
    """

    def __init__(self, config: PixelDecoderConfig, encoder: Encoder, length: int, vocab_size: int) -> None:
        super().__init__()
        width = config.width
        if width % config.heads or width % 4:
            raise UserError(
                f"the decoder's width {width} must be divisible by 4 and by its {config.heads} heads: change "
                "--method.decoder.width or --method.decoder.heads."
            )
        self.grid, self.prefix, self.length = encoder.grid, encoder.prefix, length
        self.embed = nn.Linear(encoder.width, width)
        self.mask_tokens = nn.Parameter(torch.empty(2, width))
        """For a patch, for a word."""
        self.types = nn.Parameter(torch.empty(2, width))
        """Added to patches, to words."""
        self.image_positions = nn.Parameter(torch.empty(1, encoder.num_patches, width), requires_grad=False)
        self.text_positions = nn.Parameter(torch.empty(1, length, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.norm = LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, encoder.patch_size**2 * 3)
        self.words = nn.Linear(width, vocab_size)
        """States of words -> logits; left to the caller, who needs them for few."""

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: Xavier maps, mask tokens and types N(0, 0.02), fixed positions."""
        with torch_seeded(at), torch.no_grad():
            reset(self)
            fill(self, nn.init.xavier_uniform_)
            nn.init.normal_(self.mask_tokens, std=0.02)
            nn.init.normal_(self.types, std=0.02)
            self.image_positions[0] = sincos_2d(self.types.shape[1], self.grid)
            self.text_positions[0] = sincos_1d(self.types.shape[1], self.length)

    def forward(
        self, image: Tensor, keep: Tensor, text: Tensor, keep_text: Tensor, padding: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the pixels of all patches (B, L, patch * patch * 3) and the states of all words (B, T, width).

        Args:
            image: (B, prefix + K, D) encoded visible patches, the prefix (CLS, registers) first.
            keep: (B, K) which patch each of them is.
            text: (B, M, D) encoded visible words.
            keep_text: (B, M) which word each of them is.
            padding: (B, T) bool, True where the text has ended: no token looks there.
            grid: of the image's patches, to which their positions are resampled.
        """
        image, text = self.embed(image), self.embed(text)
        positions = resample_abs_pos_embed(self.image_positions, list(grid), list(self.grid), 0)
        patches = self._complete(0, image[:, self.prefix :], keep, positions)
        words = self._complete(1, text, keep_text, self.text_positions)
        x = torch.cat([image[:, : self.prefix], patches, words], dim=1)
        hidden = F.pad(padding, (self.prefix + patches.shape[1], 0)).view(len(x), 1, 1, -1)
        bias = x.new_zeros(1, 1, 1, 1).masked_fill(hidden, -torch.inf)
        for block in self.blocks:
            x = block(x, attn_mask=bias)
        x = self.norm(x)
        return self.pixels(x[:, self.prefix : -self.length]), x[:, -self.length :]

    def _complete(self, kind: int, seen: Tensor, keep: Tensor, positions: Tensor) -> Tensor:
        """Return all tokens of a modality (B, N, width): those `seen` at `keep`, mask tokens elsewhere."""
        hidden = self.mask_tokens[kind].to(seen.dtype).expand(len(seen), positions.shape[1], -1)
        at = keep.unsqueeze(-1).expand(-1, -1, seen.shape[-1])
        return hidden.scatter(1, at, seen) + positions + self.types[kind]
