"""Any timm backbone as an `Encoder`: what every method trains, and what is evaluated, exported and compared.

This is the one file that knows timm's vision transformers from the inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import Key, torch_seeded
from altsight.data.views import low_frequency_crop, normalize
from altsight.nn.backbone import EncoderConfig as EncoderConfig
from altsight.nn.backbone import create_backbone
from altsight.nn.init import init_vit, reset, sincos_2d
from altsight.nn.once import Once

FeaturePoint = Literal["cls", "mean", "pooled", "cls_prenorm", "mean_prenorm"]
FEATURE_POINTS: tuple[FeaturePoint, ...] = ("cls", "mean", "pooled", "cls_prenorm", "mean_prenorm")


@dataclass(slots=True)
class Encoded:
    """The output of `Encoder.forward`.

    tokens: (B, prefix + L, D) after the final norm; prefix counts the CLS token and the registers.
    prenorm: the same before the final norm. layers: output of every block (ViT) or stage (others), first to last.
    grid: (H, W) where the backbone itself has the tokens as a map, which its head will want back.
    """

    tokens: Tensor
    prenorm: Tensor
    prefix: int
    layers: tuple[Tensor, ...]
    grid: tuple[int, int] | None = None

    @property
    def patches(self) -> Tensor:
        """(B, L, D): the patch tokens."""
        return self.tokens[:, self.prefix :]

    def float(self) -> Encoded:
        """Return the same in fp32."""
        layers = tuple(layer.float() for layer in self.layers)
        return Encoded(self.tokens.float(), self.prenorm.float(), self.prefix, layers, self.grid)


class Encoder(Once):
    """A timm backbone with masked encoding, all intermediates and named feature points.

    Raises:
        UserError: unknown model or normalization, or an image size that the patch size does not divide.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config)
        self.is_vit = isinstance(self.backbone, VisionTransformer)
        self.width = int(self.backbone.num_features)
        self.relative: RelPosBias | None = None
        self.input_size = config.img_size
        """Side to which `normalize` crops the spectrum of full-size images: a curriculum makes it smaller."""
        if self.is_vit:
            self.grid: tuple[int, int] = self.backbone.patch_embed.grid_size
            self.patch_size = int(self.backbone.patch_embed.patch_size[0])
            self.prefix = int(self.backbone.num_prefix_tokens)
            self.heads = int(self.backbone.blocks[0].attn.num_heads)
            if config.positions == "none":
                self.backbone.pos_embed = None
            else:
                self.backbone.pos_embed.requires_grad_(config.positions == "learned")
            if config.relative_positions:
                self.relative = _relative_positions(config.model, self.grid, self.backbone)
        else:
            side = math.ceil(config.img_size / int(self.backbone.feature_info[-1]["reduction"]))
            self.grid, self.patch_size = (side, side), 0
            self.prefix = int(getattr(self.backbone, "num_prefix_tokens", 0))

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of an unmasked image."""
        return self.grid[0] * self.grid[1]

    def patches_at(self, size: int) -> int:
        """Return the number of patches of an image of `size` x `size` pixels."""
        return (size // self.patch_size) ** 2 if self.is_vit else self.num_patches

    @property
    def input_grid(self) -> tuple[int, int]:
        """Patches of the images that `normalize` hands out now: `grid`, or less in a curriculum's early stages."""
        return (self.input_size // self.patch_size,) * 2 if self.is_vit else self.grid

    @property
    def normalizes_batch(self) -> bool:
        """True if it has batch norm, whose statistics are those of what is computed at a time."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.backbone.modules())

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`: the same key gives the same encoder under every method."""
        with torch_seeded(at.child("encoder")):
            reset(self.backbone)
            if hasattr(self.backbone, "init_weights"):
                self.backbone.init_weights()
            if self.is_vit:
                init_vit(self.backbone, self.config.init)
            if self.relative is not None:
                # Zero at the start, as in BEiT: attention begins without a view on distance.
                nn.init.zeros_(self.relative.relative_position_bias_table)
        if self.is_vit and self.config.positions == "sincos":
            with torch.no_grad():
                table = sincos_2d(self.width, self.grid)
                self.backbone.pos_embed.zero_()
                self.backbone.pos_embed[0, -self.num_patches :] = table

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that timm says must not decay (tokens and position tables)."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        found = {f"backbone.{name}" for name, _ in self.backbone.named_parameters() if name in names}
        return found if self.relative is None else found | {"relative.relative_position_bias_table"}

    def layer_of(self, name: str) -> int:
        """Return the layer of one of its parameters: 0 embeds, 1 + i is block i, the last (depth + 1) is the norm.

        Raises:
            UserError: the backbone is no vision transformer.
        """
        if not self.is_vit:
            raise UserError(f"'{self.config.model}' has no layers that are counted: leave --optim.layer-decay at 1.")
        if name.startswith("backbone.blocks."):
            return 1 + int(name.split(".")[2])
        return len(self.backbone.blocks) + 1 if name.startswith(("backbone.norm.", "backbone.fc_norm.")) else 0

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W), or fp32 in [0, 1], to this encoder's input range, fp32, on the images' device.

        Where a curriculum has set `input_size` below the encoder's own, full-size images keep their low frequencies
        only and come out at that size.
        """
        normalized: Tensor = self.remembered(self._normalize, "normalize", {"images": images})
        return normalized

    def _normalize(self, images: Tensor) -> Tensor:
        images = normalize(images, self.config.normalization)
        if images.shape[-1] == self.config.img_size > self.input_size:
            return low_frequency_crop(images, self.input_size)
        return images

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Encoded:
        """Encode normalised images (B, 3, H, W); a ViT takes any size that its patches divide.

        Args:
            images: fp32, normalised.
            keep: (B, K) indices of the visible patches; the blocks then see the prefix tokens and these K only.
            mask: (B, L) bool, True where `mask_token` (D,) takes the place of a patch's embedding, its position added.

        Raises:
            UserError: patches are to be left out or replaced, and the backbone is no vision transformer.
        """
        if not self.is_vit:
            if keep is not None or mask is not None:
                raise UserError(
                    f"'{self.config.model}' cannot encode visible patches only: masked methods need a ViT such as "
                    "vit_base_patch16_224."
                )
            return self._forward_stages(images)
        return self._transform(*self._embed(images, keep, mask, mask_token))

    def forward_with(self, images: Tensor, keep: Tensor, extra: Tensor, padding: Tensor) -> tuple[Encoded, Tensor]:
        """Encode visible patches and `extra` tokens as one sequence, in which each sees all (M3AE's text).

        Args:
            images, keep: as in `forward`; the backbone is a vision transformer.
            extra: (B, T, D), with positions of their own. Relative positions, where there are any, leave them aside.
            padding: (B, T) bool, True for those that no token may look at.

        Returns:
            (what `forward` returns, of the image's tokens; the extra tokens after the final norm (B, T, D)).
        """
        x, bias = self._embed(images, keep)
        count, length = x.shape[1], x.shape[1] + extra.shape[1]
        hidden = F.pad(padding, (count, 0)).view(-1, 1, 1, length)
        bias = x.new_zeros(1, 1, 1, 1) if bias is None else F.pad(bias, (0, length - count) * 2)
        joint = self._transform(torch.cat([x, extra.to(x.dtype)], dim=1), bias.masked_fill(hidden, -torch.inf))
        layers = tuple(layer[:, :count] for layer in joint.layers)
        return Encoded(joint.tokens[:, :count], joint.prenorm[:, :count], self.prefix, layers), joint.tokens[:, count:]

    def _embed(
        self, images: Tensor, keep: Tensor | None = None, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that enter the blocks (B, prefix + K, D), and the bias on their attention."""
        x = self.backbone.patch_embed(images)
        bias = None if self.relative is None else self._bias(x.shape[1:3])
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
        x = self._add_positions(x)
        if keep is not None:
            visible = keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, visible)], dim=1)
            bias = None if bias is None else _bias_among(bias, keep, self.prefix)
        return x, bias

    def _transform(self, x: Tensor, bias: Tensor | None) -> Encoded:
        vit = self.backbone
        x = vit.norm_pre(x)
        layers = []
        for block in vit.blocks:
            x = block(x, attn_mask=bias)
            layers.append(x)
        return Encoded(vit.norm(x), x, self.prefix, tuple(layers))

    def _add_positions(self, x: Tensor) -> Tensor:
        """Return (B, prefix + L, D) from patch embeddings (B, H, W, D)."""
        tokens: Tensor = self.backbone._pos_embed(x)
        return tokens

    def _bias(self, grid: tuple[int, ...]) -> Tensor:
        """Return the relative position bias (1, heads, N, N) for all tokens of an image on `grid`."""
        assert self.relative is not None
        if tuple(grid) != self.grid:
            raise UserError(
                f"relative positions hold for {self.grid[0]} x {self.grid[1]} patches only, not for {grid[0]} x "
                f"{grid[1]}: leave the input size as it is, or set --encoder.relative-positions False."
            )
        bias: Tensor = self.relative.get_bias()
        return bias

    def _forward_stages(self, images: Tensor) -> Encoded:
        last, layers = self.backbone.forward_intermediates(images)
        if last.ndim == 3:
            return Encoded(last, last, self.prefix, tuple(layers))
        grid = tuple(last.shape[1:3] if self._channels_last else last.shape[2:])
        tokens = last.flatten(1, 2) if self._channels_last else last.flatten(2).mT
        return Encoded(tokens, tokens, 0, tuple(layers), grid)

    @property
    def _channels_last(self) -> bool:
        return getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    def point(self, encoded: Encoded, name: FeaturePoint) -> Tensor:
        """Return the (B, D) vector at a feature point.

        cls, mean: the CLS token, the mean of the patch tokens, after the final norm; *_prenorm: before it.
        pooled: what timm's own head would read.

        Raises:
            UserError: the backbone has no CLS token, or the name is unknown.
        """
        check_point(name)
        if name == "pooled":
            return self._pooled(encoded)
        tokens = encoded.prenorm if name.endswith("_prenorm") else encoded.tokens
        if name.startswith("mean"):
            return tokens[:, encoded.prefix :].mean(dim=1)
        if getattr(self.backbone, "cls_token", None) is None:
            raise UserError(f"'{self.config.model}' has no CLS token: use the feature point 'mean' or 'pooled'.")
        return tokens[:, 0]

    def _pooled(self, encoded: Encoded) -> Tensor:
        tokens = encoded.tokens
        if encoded.grid is not None:
            tokens = tokens.unflatten(1, encoded.grid) if self._channels_last else tokens.mT.unflatten(2, encoded.grid)
        return self.backbone.forward_head(tokens, pre_logits=True)


def _relative_positions(model: str, grid: tuple[int, int], backbone: Any) -> RelPosBias:
    if backbone.num_prefix_tokens > 1:
        raise UserError("relative positions know one token beside the patches: set --encoder.registers 0.")
    return RelPosBias(grid, backbone.blocks[0].attn.num_heads, backbone.num_prefix_tokens)


def _bias_among(bias: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """Return the (B, heads, prefix + K, prefix + K) part of `bias` between the tokens that are kept."""
    first = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
    kept = torch.cat([first, keep + prefix], dim=1)
    return bias[0][:, kept.unsqueeze(2), kept.unsqueeze(1)].transpose(0, 1)


def check_point(name: str) -> None:
    """Raise UserError if `name` is not a feature point."""
    if name not in FEATURE_POINTS:
        raise UserError(f"'{name}' is no feature point.{did_you_mean(name, FEATURE_POINTS)}")
