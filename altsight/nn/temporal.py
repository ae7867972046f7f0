"""A transformer over the frames of a video: Text4Vis' temporal head (Wu et al. 2023; specification 4.2)."""

from __future__ import annotations

import functools

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.init import fill, normal, reset

EPS = 1e-12
"""Of the layer norms."""


class TemporalTransformer(nn.Module):
    """Vectors of frames (B, T, E) -> what is to be averaged over them (B, T, E): the input, and a transformer's output.

    Pre-norm blocks with QuickGELU, and a learned position for every frame. The input passes through the blocks'
    residuals, too: where blocks and positions add nothing, the mean over frames keeps its direction. Call
    `init_weights` before use.

    Args:
        width: E. heads: of 64 channels each in the source.
        frames: T.

    Raises:
        UserError: the width is not divisible by the number of heads.
    """

    def __init__(self, width: int, heads: int, layers: int, frames: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"vectors of {width} numbers cannot be split among {heads} heads: mend --temporal.heads.")
        self.positions = nn.Parameter(torch.empty(frames, width))
        norm = functools.partial(nn.LayerNorm, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, act_layer=QuickGELU, norm_layer=norm)  # type: ignore[arg-type]
            for _ in range(layers)
        )

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps and positions N(0, 0.02), biases 0."""
        with torch_seeded(at):
            reset(self)
            fill(self, normal)
            normal(self.positions)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.positions
        for block in self.blocks:
            y = block(y)
        return y + x
