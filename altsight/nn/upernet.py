"""UPerNet: a pyramid of pooled contexts and a feature pyramid, read together (Xiao et al. 2018; specification D6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from altsight.core.rng import Key, torch_seeded
from altsight.nn.dense import FeatureMaps, conv_norm, resize
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.init import reset

POOLS = (1, 2, 3, 6)
"""Rows and columns of the pooled contexts."""


class UPerHead(nn.Module):
    """Four maps, fine to coarse -> logits (B, classes, H, W) at the size of the finest. channels: width of the head."""

    def __init__(self, channels_in: Sequence[int], channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        *fine, coarse = channels_in
        self.pools = nn.ModuleList(conv_norm(coarse, channels, 1) for _ in POOLS)
        self.bottleneck = conv_norm(coarse + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm(width, channels, 1) for width in fine)
        self.outs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in fine)
        self.fuse = conv_norm(len(channels_in) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        coarse = maps[-1]
        contexts = [
            resize(pool(adaptive_avg_pool2d(coarse, side)), coarse.shape[2:])
            for side, pool in zip(POOLS, self.pools, strict=True)
        ]
        above = self.bottleneck(torch.cat([coarse, *contexts], dim=1))
        found = [above]
        pairs = list(zip(self.laterals, self.outs, maps[:-1], strict=True))
        for lateral, out, x in reversed(pairs):
            side = lateral(x)
            above = side + resize(above, side.shape[2:])
            found.insert(0, out(above))
        finest = found[0].shape[2:]
        whole = self.fuse(torch.cat([found[0], *(resize(x, finest) for x in found[1:])], dim=1))
        return self.classifier(self.dropout(whole))


class FCNHead(nn.Module):
    """One map -> logits (B, classes, H, W), by one convolution and the classifier; used in training only."""

    def __init__(self, channels_in: int, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv_norm(channels_in, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


class UPerNet(nn.Module):
    """Encoded images -> logits of the head and, in training, of an FCN on the third map.

    channels: of the head. Call `init_weights` before use.
    """

    def __init__(
        self, encoder: Encoder, classes: int, channels: int = 512, auxiliary: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.maps = FeatureMaps(encoder)
        self.head = UPerHead(self.maps.channels, channels, classes, dropout)
        self.auxiliary = FCNHead(self.maps.channels[2], auxiliary, classes, dropout)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`; the classifiers N(0, 0.01), as in mmsegmentation."""
        with torch_seeded(at):
            reset(self)
            for classifier in (self.head.classifier, self.auxiliary.classifier):
                nn.init.normal_(classifier.weight, std=0.01)
                nn.init.zeros_(classifier.get_parameter("bias"))

    def forward(self, encoder: Encoder, encoded: Encoded) -> dict[str, Tensor]:
        maps = self.maps(encoder, encoded)
        logits = {"segmentation": self.head(maps)}
        return logits | {"auxiliary": self.auxiliary(maps[2])} if self.training else logits
