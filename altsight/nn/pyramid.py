"""Feature pyramids for detection: maps at strides 4, 8, 16, 32 and 64 from the last map of a ViT, or a CNN's stages."""

from __future__ import annotations

from collections import OrderedDict

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from altsight.core.errors import UserError
from altsight.nn.encoder import Encoded, Encoder

Maps = OrderedDict[str, Tensor]
"""Level ("0", finest, to "3", and "pool") -> (B, width, H, W)."""
LEVELS = 4


class Pyramid(nn.Module):
    """What detection asks of a pyramid: `out_channels` at every level, and `strides` in pixels, finest first."""

    out_channels: int
    strides: tuple[int, ...]


class SimplePyramid(Pyramid):
    """ViTDet's: the last map of a plain ViT at 4, 2, 1 and 1/2 times its size, and the coarsest once more halved.

    Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (specification D7). Each is
    mapped to `width` channels by a 1 x 1 and a 3 x 3 convolution, both normalised over the channels.
    """

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        dim, patch = encoder.width, encoder.patch_size
        self.grid, self.out_channels = encoder.grid, width
        self.strides = tuple(patch * factor // 4 for factor in (1, 2, 4, 8, 16))
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_double(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), _double(dim // 2, dim // 4)),
                _double(dim, dim // 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.outputs = nn.ModuleList([_output(channels, width) for channels in (dim // 4, dim // 2, dim, dim)])
        self.coarsest = nn.MaxPool2d(1, stride=2)

    def forward(self, encoded: Encoded) -> Maps:
        """Return the maps of encoded images; the last block is read before the encoder's final norm."""
        last = encoded.prenorm[:, encoded.prefix :].transpose(1, 2).unflatten(2, self.grid)
        maps = Maps()
        for level, (scale, output) in enumerate(zip(self.scales, self.outputs, strict=True)):
            maps[str(level)] = output(scale(last))
        maps["pool"] = self.coarsest(maps[str(LEVELS - 1)])
        return maps


class StagePyramid(Pyramid):
    """Lin et al. 2017's, by torchvision: the last four stages of a CNN, coarse ones added to fine ones."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        stages = list(encoder.backbone.feature_info)[-LEVELS:]
        if len(stages) < LEVELS:
            raise UserError(
                f"'{encoder.config.model}' has fewer than {LEVELS} stages, so it makes no pyramid: use a ViT."
            )
        self.out_channels = width
        reductions = [int(stage["reduction"]) for stage in stages]
        self.strides = (*reductions, 2 * reductions[-1])
        self.pyramid = FeaturePyramidNetwork([int(s["num_chs"]) for s in stages], width, LastLevelMaxPool())

    def forward(self, encoded: Encoded) -> Maps:
        """Return the maps of encoded images."""
        stages = encoded.layers[-LEVELS:]
        maps: Maps = self.pyramid(OrderedDict((str(level), stage) for level, stage in enumerate(stages)))
        return maps


def make_pyramid(encoder: Encoder, width: int) -> Pyramid:
    """Return the pyramid that suits `encoder`, with `width` channels.

    Raises:
        UserError: it is neither a ViT nor a CNN with four stages.
    """
    return SimplePyramid(encoder, width) if encoder.is_vit else StagePyramid(encoder, width)


def _double(channels: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, kernel_size=2, stride=2)


def _output(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )
