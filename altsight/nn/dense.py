"""What dense heads share: four maps of different strides from any encoder, and convolutions with batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.dist import gather, world
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.init import reset


class MapNorm(nn.BatchNorm2d):
    """Batch norm of maps (B, C, H, W) over the pixels of all ranks, in fp32 (mmsegmentation's SyncBN).

    Any number of ranks computes what one does; every rank must hold equally large maps. Running statistics are kept for
    evaluation.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input.float()
        if not self.training or world().size == 1:
            return super().forward(x)
        mean = gather(x.mean(dim=(0, 2, 3))[None]).mean(dim=0)
        centred = x - mean[:, None, None]
        variance = gather(centred.square().mean(dim=(0, 2, 3))[None]).mean(dim=0)
        self._remember(mean.detach(), variance.detach(), world().size * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, pixels: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * pixels / max(pixels - 1, 1), self.momentum)


def conv_norm(channels_in: int, channels: int, kernel: int) -> nn.Sequential:
    """Return a convolution that keeps the size, batch norm and ReLU."""
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, MapNorm(channels), nn.ReLU())


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Return maps (B, C, h, w) at another size, bilinearly, in fp32."""
    return F.interpolate(x.float(), tuple(size), mode="bilinear", align_corners=False)


def levels_of(depth: int) -> tuple[int, int, int, int]:
    """Return which blocks of a plain transformer the four maps come from: 3, 5, 7, 11 of 12; 7, 11, 15, 23 of 24."""
    third, half, two_thirds = (max(blocks - 1, 0) for blocks in (depth // 3, depth // 2, 2 * depth // 3))
    return third, half, two_thirds, depth - 1


def is_plain(encoder: Encoder) -> bool:
    """Return whether all layers have one stride: a transformer without stages."""
    return len({stage["reduction"] for stage in encoder.backbone.feature_info}) == 1


class FeatureMaps(nn.Module):
    """Encoded images of the encoder's own size -> four maps, fine to coarse, of `channels[i]` channels each.

    A backbone with stages (ResNet, Swin) hands out its last four. All blocks of a plain transformer have the stride of
    its patches: four of them are brought to a quarter, a half, one and two patches by transposed convolutions, nothing
    and pooling (BEiT; specification D6).

    Args:
        norm: a group norm of one group before that (DenseCLIP).

    Raises:
        UserError: the backbone has fewer than four stages.
    """

    def __init__(self, encoder: Encoder, norm: bool = False) -> None:
        super().__init__()
        info = list(encoder.backbone.feature_info)
        self.is_plain = is_plain(encoder)
        if not self.is_plain:
            if len({stage["reduction"] for stage in info[-4:]}) < 4:
                raise UserError(
                    f"'{encoder.config.model}' has no four stages of different strides to predict pixels from: use a "
                    "vision transformer, or a network with stages such as resnet50."
                )
            self.channels = tuple(int(stage["num_chs"]) for stage in info[-4:])
            return
        width = encoder.width
        self.channels = (width,) * 4
        self.levels = levels_of(len(info))
        twice, again = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(2))
        self.scale = nn.ModuleList(
            [
                nn.Sequential(twice, MapNorm(width), nn.GELU(), again),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width, eps=1e-6) if norm else nn.Identity() for _ in self.levels)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`, as torch does."""
        with torch_seeded(at):
            reset(self)

    def forward(self, encoder: Encoder, encoded: Encoded) -> list[Tensor]:
        if not self.is_plain:
            return list(encoded.layers[-4:])
        # timm hands out the layers of other transformers as maps.
        layers = [encoded.layers[level] for level in self.levels]
        maps = [to_map(x[:, encoded.prefix :], encoder.grid) if x.ndim == 3 else x for x in layers]
        return [scale(norm(x)) for scale, norm, x in zip(self.scale, self.norms, maps, strict=True)]


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return patch tokens (B, L, D) as a map (B, D, H, W)."""
    return patches.mT.unflatten(2, grid)


class LinearHead(nn.Module):
    """Encoded images -> logits of every patch: batch norm and a linear map (DINOv2, iBOT; specification D6).

    Call `init_weights` before use.

    Args:
        layers: how many of a transformer's last blocks are put side by side, each through its last norm ("+ms": 4).

    Raises:
        UserError: the encoder does not have so many blocks.
    """

    def __init__(self, encoder: Encoder, classes: int, layers: int = 1) -> None:
        super().__init__()
        depth = len(encoder.backbone.blocks) if encoder.is_vit else 1
        if not 1 <= layers <= depth:
            raise UserError(f"a linear head cannot read the last {layers} layers of {depth}: set --layers.")
        self.layers = layers
        self.norm = MapNorm(encoder.width * layers)
        self.classifier = nn.Conv2d(encoder.width * layers, classes, 1)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`; the classifier N(0, 0.01), as in mmsegmentation."""
        with torch_seeded(at):
            reset(self)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, encoder: Encoder, encoded: Encoded) -> dict[str, Tensor]:
        tokens = encoded.patches
        if self.layers > 1:
            layers = [encoder.backbone.norm(layer) for layer in encoded.layers[-self.layers :]]
            tokens = torch.cat(layers, dim=-1)[:, encoded.prefix :]
        return {"segmentation": self.classifier(self.norm(to_map(tokens, encoder.grid)))}
