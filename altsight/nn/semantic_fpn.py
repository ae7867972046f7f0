"""Semantic FPN (Kirillov et al. 2019): a feature pyramid, every level of which is brought to the finest and summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.rng import Key, torch_seeded
from altsight.nn.dense import conv_norm, resize
from altsight.nn.init import reset


class SemanticFPN(nn.Module):
    """Four maps, fine to coarse, each half the size of the one before -> logits (B, classes, H, W) of the finest size.

    Call `init_weights` before use.
    """

    def __init__(self, channels_in: Sequence[int], classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in channels_in)
        self.outs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in channels_in)
        self.levels = nn.ModuleList(_level(channels, doublings) for doublings in range(len(channels_in)))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: Xavier in the pyramid, the classifier N(0, 0.01), as in mmsegmentation."""
        with torch_seeded(at):
            reset(self)
            for conv in (*self.laterals, *self.outs):
                nn.init.xavier_uniform_(conv.get_parameter("weight"))
                nn.init.zeros_(conv.get_parameter("bias"))
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, maps: list[Tensor]) -> Tensor:
        sides = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in range(len(sides) - 1, 0, -1):
            sides[level - 1] = sides[level - 1] + F.interpolate(sides[level], sides[level - 1].shape[2:])
        finest = sides[0].shape[2:]
        levels = [level(out(x)) for level, out, x in zip(self.levels, self.outs, sides, strict=True)]
        total = torch.stack([resize(level, finest) for level in levels]).sum(dim=0)
        return self.classifier(self.dropout(total))


def _level(channels: int, doublings: int) -> nn.Sequential:
    """Return as many convolutions with a doubling of the size each; the finest level has one without."""
    if not doublings:
        return conv_norm(channels, channels, 3)
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return nn.Sequential(*(layer for _ in range(doublings) for layer in (conv_norm(channels, channels, 3), double)))
