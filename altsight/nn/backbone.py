"""Which timm backbone an encoder is, and how timm is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
from timm.layers import QuickGELU
from timm.models import model_entrypoint
from torch import nn

from altsight.core.errors import UserError, did_you_mean
from altsight.data.views import statistics
from altsight.nn.init import VitInit

TRANSFORMERS = ("vision_transformer", "deit", "beit", "eva")
"""timm's families whose width, depth and heads can be set."""


@dataclass(frozen=True)
class EncoderConfig:
    """Which backbone, at which size. Fields left at None keep timm's value for the model."""

    model: str = "vit_base_patch16_224"
    img_size: int = 224
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    """Width of the feed-forward layers, in widths of the encoder."""
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
    global_pool: Literal["", "token", "avg", "map"] | None = None
    """What timm's head reads; with avg timm's models put their last norm behind the mean of the tokens."""
    norm_eps: float | None = None
    """Added to the variance in the layer norms."""
    normalization: str = "imagenet"
    """Mean and deviation of the input by name (imagenet, clip, cc12m, half), or as MEAN,MEAN,MEAN/STD,STD,STD."""


def create_backbone(config: EncoderConfig) -> Any:
    """Return timm's model for `config`, without a classifier.

    Raises:
        UserError: unknown model or normalization, or an image size that the patch size does not divide.
    """
    _check(config)
    arguments = _arguments(config)
    try:
        return timm.create_model(config.model, drop_path_rate=config.drop_path, **arguments)
    except TypeError as error:
        if config.drop_path == 0 and "drop_path_rate" in str(error):
            return timm.create_model(config.model, **arguments)
        raise UserError(
            f"timm's '{config.model}' cannot be built with these settings ({error}): leave the others of --encoder.* "
            "at their defaults, or use another model."
        ) from None


def _check(config: EncoderConfig) -> None:
    if not timm.is_model(config.model):
        raise UserError(f"timm has no model '{config.model}'.{_near_models(config.model)}")
    statistics(config.normalization)
    patch = config.patch_size or _default_patch(config.model)
    if patch and config.img_size % patch and not _cuts_a_margin(config):
        lower = config.img_size // patch * patch
        raise UserError(
            f"the image size {config.img_size} is not divisible by the patch size {patch}: use "
            f"--encoder.img-size {lower or patch} or {lower + patch}, or another --encoder.patch-size."
        )


def _cuts_a_margin(config: EncoderConfig) -> bool:
    """Return whether timm itself has the model at a size whose last pixels no patch covers (So400m/14 at 384)."""
    cfg, patch = timm.get_pretrained_cfg(config.model), _default_patch(config.model)
    if cfg is None or patch is None or config.patch_size not in (None, patch):
        return False
    return bool(config.img_size == cfg.input_size[-1] and config.img_size % patch)


def _near_models(name: str) -> str:
    return did_you_mean(name, timm.list_models()) if len(name) > 2 else ""


def _default_patch(model: str) -> int | None:
    for part in model.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            return int(part[5:])
    return None


def _arguments(config: EncoderConfig) -> dict[str, Any]:
    """Return timm's keyword arguments for `config`; a plain ResNet takes none of the transformer's."""
    arguments: dict[str, Any] = {"num_classes": 0}
    kind = family(config.model)
    if kind in TRANSFORMERS:
        arguments |= {
            "img_size": config.img_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
            "init_values": config.layer_scale,
            "global_pool": config.global_pool,
            "norm_layer": config.norm_eps and partial(nn.LayerNorm, eps=config.norm_eps),
        }
    elif has_fixed_size(config.model):
        arguments["img_size"] = config.img_size
    if kind in ("vision_transformer", "deit"):
        arguments |= {
            "reg_tokens": config.registers or None,
            "dynamic_img_size": not _cuts_a_margin(config),
            "pre_norm": config.pre_norm or None,
            "act_layer": QuickGELU if config.quick_gelu else None,
        }
    return {name: value for name, value in arguments.items() if value is not None}


def family(model: str) -> str:
    """Return the name of timm's module with `model`, as "vision_transformer"."""
    return model_entrypoint(model).__module__.removeprefix("timm.models.")


def has_fixed_size(model: str) -> bool:
    """Return whether timm builds `model` for images of one size."""
    config = timm.get_pretrained_cfg(model)
    return config is not None and bool(config.fixed_input_size)
