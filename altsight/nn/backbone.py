"""Which timm backbone an encoder is, and how timm is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
from timm.layers import QuickGELU

from altsight.core.errors import UserError, did_you_mean
from altsight.data.views import NORMALIZATIONS
from altsight.nn.init import VitInit


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
    layer_scale: float | None = None
    """Initial value of a learned factor on every residual branch (BEiT, DINOv2); None: no such factor."""
    positions: Literal["sincos", "learned", "none"] = "sincos"
    """sincos: fixed 2-D sine-cosine table (MAE); learned: trained table (CLIP); none (BEiT, SimMIM)."""
    relative_positions: bool = False
    """A learned bias on attention by relative position, one table for all blocks (BEiT, SimMIM)."""
    init: VitInit = "mae"
    """mae: Xavier for every linear map, the patch embedding included; timm: timm's own; beit: N(0, 0.02), with the
    last map of each branch of block l divided by sqrt(2 l); moco: mae with q, k and v as three maps."""
    pre_norm: bool = False
    """A LayerNorm before the first block (CLIP's ln_pre)."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) instead of the exact GELU (OpenAI's CLIP)."""
    normalization: str = "imagenet"


def create_backbone(config: EncoderConfig) -> Any:
    """Return timm's model for `config`, without a classifier.

    Raises:
        UserError: unknown model or normalization, or an image size that the patch size does not divide.
    """
    _check(config)
    return timm.create_model(config.model, **_arguments(config))


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
        "init_values": config.layer_scale,
        "dynamic_img_size": True,
        "pre_norm": config.pre_norm or None,
        "act_layer": QuickGELU if config.quick_gelu else None,
    }
    return {name: value for name, value in arguments.items() if value is not None}
