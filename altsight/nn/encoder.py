"""Any timm backbone as an `Encoder`: what every method trains, and what is evaluated, exported and compared.

This is the one file that knows timm's vision transformers from the inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import Key, torch_seeded
from altsight.data.views import NORMALIZATIONS, normalize

FeaturePoint = Literal["cls", "mean", "pooled", "cls_prenorm", "mean_prenorm"]
FEATURE_POINTS: tuple[FeaturePoint, ...] = ("cls", "mean", "pooled", "cls_prenorm", "mean_prenorm")


@dataclass(frozen=True)
class EncoderConfig:
    """Which backbone, at which size. Fields left at None keep timm's value for the model."""

    model: str = "vit_base_patch16_224"
    img_size: int = 224
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    registers: int = 0
    drop_path: float = 0.0
    positions: Literal["sincos", "learned"] = "sincos"
    """sincos: fixed 2-D sine-cosine table (MAE); learned: trained table (CLIP)."""
    init: Literal["mae", "timm"] = "mae"
    """mae: Xavier for every linear map, the patch embedding included; timm: timm's own initialisation."""
    pre_norm: bool = False
    """A LayerNorm before the first block (CLIP's ln_pre)."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) instead of the exact GELU (OpenAI's CLIP)."""
    normalization: str = "imagenet"


@dataclass(slots=True)
class Encoded:
    """The output of `Encoder.forward`.

    tokens: (B, prefix + L, D) after the final norm; prefix counts the CLS token and the registers.
    prenorm: the same before the final norm. layers: output of every block (ViT) or stage (others), first to last.
    """

    tokens: Tensor
    prenorm: Tensor
    prefix: int
    layers: tuple[Tensor, ...]

    @property
    def patches(self) -> Tensor:
        """(B, L, D): the patch tokens."""
        return self.tokens[:, self.prefix :]


class Encoder(nn.Module):
    """A timm backbone with masked encoding, all intermediates and named feature points.

    Raises:
        UserError: unknown model or normalization, or an image size that the patch size does not divide.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.backbone = cast(Any, timm.create_model(config.model, **_arguments(config)))
        self.is_vit = isinstance(self.backbone, VisionTransformer)
        self.width = int(self.backbone.num_features)
        if self.is_vit:
            self.grid: tuple[int, int] = self.backbone.patch_embed.grid_size
            self.patch_size = int(self.backbone.patch_embed.patch_size[0])
            self.prefix = int(self.backbone.num_prefix_tokens)
            self.backbone.pos_embed.requires_grad_(config.positions == "learned")
        else:
            side = config.img_size // int(self.backbone.feature_info[-1]["reduction"])
            self.grid, self.patch_size, self.prefix = (side, side), 0, 0

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of an unmasked image."""
        return self.grid[0] * self.grid[1]

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`: the same key gives the same encoder under every method."""
        with torch_seeded(at.child("encoder")):
            reset(self.backbone)
            if hasattr(self.backbone, "init_weights"):
                self.backbone.init_weights()
            if self.is_vit and self.config.init == "mae":
                self._init_mae()
        if self.is_vit and self.config.positions == "sincos":
            with torch.no_grad():
                table = sincos_2d(self.width, self.grid)
                self.backbone.pos_embed.zero_()
                self.backbone.pos_embed[0, -self.num_patches :] = table

    def _init_mae(self) -> None:
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.backbone.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        for token in (self.backbone.cls_token, self.backbone.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that timm says must not decay (tokens and position tables)."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name, _ in self.backbone.named_parameters() if name in names}

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to this encoder's input range, in fp32, on the images' device."""
        return normalize(images, self.config.normalization)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Encoded:
        """Encode normalised images (B, 3, H, W).

        Args:
            images: fp32, normalised.
            keep: (B, K) indices of the visible patches; the blocks then see the prefix tokens and these K only.

        Raises:
            UserError: `keep` is given and the backbone is no vision transformer.
        """
        if not self.is_vit:
            if keep is not None:
                raise UserError(
                    f"'{self.config.model}' cannot encode visible patches only: masked methods need a ViT such as "
                    "vit_base_patch16_224."
                )
            return self._forward_stages(images)
        vit = self.backbone
        x = vit._pos_embed(vit.patch_embed(images))
        if keep is not None:
            visible = keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, visible)], dim=1)
        x = vit.norm_pre(x)
        layers = []
        for block in vit.blocks:
            x = block(x)
            layers.append(x)
        return Encoded(vit.norm(x), x, self.prefix, tuple(layers))

    def _forward_stages(self, images: Tensor) -> Encoded:
        last, layers = self.backbone.forward_intermediates(images)
        tokens = last.flatten(2).transpose(1, 2)
        return Encoded(tokens, tokens, 0, tuple(layers))

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
        if not self.is_vit:
            tokens = tokens.transpose(1, 2).unflatten(2, self.grid)
        return self.backbone.forward_head(tokens, pre_logits=True)


def check_point(name: str) -> None:
    """Raise UserError if `name` is not a feature point."""
    if name not in FEATURE_POINTS:
        raise UserError(f"'{name}' is no feature point.{did_you_mean(name, FEATURE_POINTS)}")


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed position table (H * W, width) of MAE: half of the channels for the column, half for the row.

    Each half holds sines then cosines of position / 10000^(i / (width / 4)).
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    rate = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    parts = []
    for coordinate in (columns, rows):
        angle = coordinate.reshape(-1, 1) * rate
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


def reset(module: nn.Module) -> None:
    """Call `reset_parameters` on every submodule that has it, so that no memory is left as it was allocated."""
    for child in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(child, name):
                getattr(child, name)()
                break


def _check(config: EncoderConfig) -> None:
    if not timm.is_model(config.model):
        raise UserError(f"timm has no model '{config.model}'.{_near_models(config.model)}")
    if config.normalization not in NORMALIZATIONS:
        near = did_you_mean(config.normalization, NORMALIZATIONS)
        raise UserError(f"no normalization '{config.normalization}'.{near}")
    patch = config.patch_size or _default_patch(config.model)
    if patch and config.img_size % patch:
        lower = config.img_size // patch * patch
        raise UserError(
            f"the image size {config.img_size} is not divisible by the patch size {patch}: use "
            f"--encoder.img-size {lower or patch} or {lower + patch}, or another --encoder.patch-size."
        )


def _near_models(name: str) -> str:
    return did_you_mean(name, timm.list_models()) if len(name) > 2 else ""


def _default_patch(model: str) -> int | None:
    for part in model.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            return int(part[5:])
    return None


def _arguments(config: EncoderConfig) -> dict[str, Any]:
    """Return timm's keyword arguments for `config`; a plain ResNet takes none of the transformer's."""
    arguments: dict[str, Any] = {"num_classes": 0, "drop_path_rate": config.drop_path}
    if not config.model.startswith(("vit_", "deit")):
        return arguments
    arguments |= {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "reg_tokens": config.registers or None,
        "pre_norm": config.pre_norm or None,
        "act_layer": QuickGELU if config.quick_gelu else None,
    }
    return {name: value for name, value in arguments.items() if value is not None}
