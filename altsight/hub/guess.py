"""Which model some weights are of, read off their names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.hub.names import ratio_of
from altsight.hub.timm import converted, described
from altsight.nn.encoder import Encoder, EncoderConfig, FeaturePoint
from altsight.nn.init import sincos_2d

Weights = Mapping[str, Tensor]
TABLE = "relative_position_bias_table"
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
"""Width -> heads of the ViTs whose heads are not 64 wide: So400m, H, g, G and e. No weight shows how many there are."""
FAMILIES = {
    "layer1.0.conv1.weight": ("resnet18", "resnet34", "resnet26", "resnet50", "resnet101", "resnet152"),
    "layers.0.blocks.0.attn.qkv.weight": tuple(
        f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")
    ),
    "attn_pool.latent": ("vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_224"),
    "conv_stem.weight": (
        *(f"efficientnet_b{i}" for i in range(5)),
        *("mobilenetv3_small_100", "mobilenetv3_large_100"),
    ),
    **dict.fromkeys(
        ("stages.0.blocks.0.conv_dw.weight", "stages.0.0.dwconv.weight"),
        (
            *(f"convnext_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")),
            *(f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
        ),
    ),
    **dict.fromkeys(
        ("blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"),
        tuple(f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large")),
    ),
}
"""A name among the weights -> the models of timm that are tried on them, at the size that timm has them for."""


@dataclass(frozen=True)
class Guess:
    """What weights are, in words; the encoder's config; the weights under timm's names; where features are read.

    point: None where timm's own head would read them.
    """

    recognised: str
    config: EncoderConfig
    weights: Weights
    point: FeaturePoint | None = None


def is_vit(weights: Weights) -> bool:
    """Return whether these are weights of a ViT with a class token, under the names of timm, MAE, DINO and BEiT."""
    plain = {"patch_embed.proj.weight", "cls_token", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"}
    return plain <= weights.keys() and (is_beit(weights) or "blocks.0.attn.qkv.bias" in weights)


def is_beit(weights: Weights) -> bool:
    """Return whether a ViT has BEiT's tables of relative positions."""
    return f"blocks.0.attn.{TABLE}" in weights or f"rel_pos_bias.{TABLE}" in weights


def plain_vit(weights: Weights, model: str = "") -> EncoderConfig:
    """Return the config of a ViT under timm's names, its sizes read off the weights; heads are 64 wide by custom.

    Args:
        model: timm's model whose details it has; "": that of a plain ViT or, where the class token has no row in the
            position table, of DINOv2 with registers or DeiT III.

    Raises:
        UserError: its patches do not form a square, or nothing says what its input size is.
    """
    width, patch = weights["patch_embed.proj.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]
    side, rows = _side(weights)
    scales = "blocks.0.ls1.gamma" in weights
    inner = len(weights.get("blocks.0.mlp.fc1.bias", ())) or 4 * width  # gated ones are as wide as their model has them
    without_row = "vit_base_patch14_reg4_dinov2" if "reg_token" in weights else "deit3_base_patch16_224"
    model = model or (without_row if scales and rows == 0 else "vit_base_patch16_224")
    return EncoderConfig(
        model,
        img_size=side * patch,
        patch_size=patch,
        width=width,
        depth=depth(weights),
        heads=heads_of(width),
        mlp_ratio=None if inner == 4 * width else ratio_of(inner, width),
        registers=weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        layer_scale=1e-5 if scales else None,
        positions="sincos" if _is_sincos(weights, width, side) else "learned",
        global_pool="avg" if "fc_norm.weight" in weights and "norm.weight" not in weights else None,
        pre_norm="norm_pre.weight" in weights,
    )


def dinov2(weights: dict[str, Tensor]) -> Guess:
    """Return what DINOv2's own weights are, with or without registers."""
    registers = "register_tokens" in weights
    size = "giant" if any(".mlp.w12." in name for name in weights) else "base"
    model = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    config = plain_vit(weights, model)
    config = replace(config, layer_scale=None, registers=weights["register_tokens"].shape[1] if registers else 0)
    return Guess(f"DINOv2{' with registers' if registers else ''}", config, converted(weights, config), "cls")


def beit(weights: dict[str, Tensor]) -> Guess:
    """Return what BEiT's own weights are: timm's model, whose blocks have a table of relative positions each."""
    shared = weights.pop(f"rel_pos_bias.{TABLE}", None)
    blocks = depth(weights)
    if shared is not None:
        # One table for all blocks: each of timm's has its own, and these are equal.
        weights |= {f"blocks.{i}.attn.{TABLE}": shared for i in range(blocks)}
    width, patch = weights["patch_embed.proj.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]
    rows = weights[f"blocks.0.attn.{TABLE}"].shape[0] - 3  # three for the class token: to, from, and itself
    tuned = "fc_norm.weight" in weights
    config = EncoderConfig(
        "beit_base_patch16_224",
        img_size=(math.isqrt(rows) + 1) // 2 * patch,
        patch_size=patch,
        width=width,
        depth=blocks,
        heads=weights[f"blocks.0.attn.{TABLE}"].shape[1],
        global_pool="avg" if tuned else "token",
        positions="learned",
        normalization="half",
    )
    name = "BEiT, fine-tuned" if tuned else "BEiT, pre-trained"
    return Guess(name, config, converted(weights, config), "pooled" if tuned else "mean")


def heads_of(width: int) -> int:
    """Return how many heads a ViT of this width has by custom."""
    return HEADS.get(width, max(width // 64, 1))


def depth(weights: Weights) -> int:
    """Return how many blocks there are."""
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))


def common(weights: Weights) -> tuple[EncoderConfig, Weights] | None:
    """Return the config of the model in `FAMILIES` that these are the weights of, and them under its names; or None."""
    for model in dict.fromkeys(model for mark, models in FAMILIES.items() if mark in weights for model in models):
        with torch.device("meta"):
            encoder = Encoder(described(model))
        own = {name: value.shape for name, value in encoder.backbone.state_dict().items()}
        try:
            found = converted(dict(weights), encoder.config)
        except (KeyError, AttributeError, RuntimeError, IndexError):
            continue  # what timm knows of this family's files does not fit these
        if all(name in found and found[name].shape == shape for name, shape in own.items()):
            return encoder.config, found
    return None


def _side(weights: Weights) -> tuple[int, int]:
    """Return the side of the grid of patches, and how many tokens before the patches have a row in the table."""
    if "pos_embed" not in weights:
        raise UserError("no position table shows the input size of this ViT: name its model as timm:NAME=FILE.")
    length = weights["pos_embed"].shape[1]
    side = math.isqrt(length)
    if length - side**2 > 5:
        raise UserError(f"a position table of {length} rows is of no square image: square ones only can be read.")
    return side, length - side**2


def _is_sincos(weights: Weights, width: int, side: int) -> bool:
    table = weights["pos_embed"][0, -(side**2) :]
    return width % 4 == 0 and torch.allclose(table, sincos_2d(width, (side, side)), atol=1e-4)
