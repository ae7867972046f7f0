"""An encoder filled with weights under timm's names, whatever library they came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.nn.encoder import Encoder, EncoderConfig, FeaturePoint

LAYERS = ("blocks.", "layers.", "stages.")
TABLES = ("relative_position_index", "attn_mask", "relative_coords_table")
"""What some keep among the weights and others compute."""


def filled(config: EncoderConfig, weights: Mapping[str, Tensor], given: str) -> tuple[Encoder, tuple[str, ...]]:
    """Return the encoder of `config` with `weights` (timm's names), and the names that it has no place for.

    Raises:
        UserError: a weight is missing, has another shape or belongs to a layer of another kind, or timm's model is of a
            kind that `Encoder` cannot serve.
    """
    encoder = _built(config)
    own = encoder.backbone.state_dict()
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise UserError(
            f"the weights in '{given}' lack {len(missing)} of the {len(own)} tensors of '{config.model}' "
            f"({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}): they are of another model; name theirs as "
            "timm:NAME=FILE."
        )
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise UserError(
                f"'{name}' in '{given}' is {tuple(weights[name].shape)}, and '{config.model}' has it as "
                f"{tuple(value.shape)}: they are of another model; name theirs as timm:NAME=FILE."
            )
    left = sorted(weights.keys() - own.keys())
    if inner := [name for name in left if name.startswith(LAYERS) and not name.endswith(TABLES)]:
        raise UserError(
            f"the weights in '{given}' have '{inner[0]}' in their layers, which '{config.model}' has not: they are of "
            "another model; name theirs as timm:NAME=FILE."
        )
    encoder.backbone.load_state_dict({name: weights[name] for name in own})
    check_served(encoder)
    return encoder.eval(), tuple(left)


def _built(config: EncoderConfig) -> Encoder:
    try:
        return Encoder(config)
    except AttributeError as error:
        raise UserError(
            f"timm's '{config.model}' is a ViT of a kind that Altsight's encoders do not know ({error}): use another."
        ) from None


def check_served(encoder: Encoder) -> None:
    """Compare the features of a backbone that is no plain ViT with what timm itself makes of it.

    Raises:
        UserError: they differ, so that `Encoder` does not fit this kind of backbone.
    """
    if not encoder.is_vit and (reason := _differs(encoder.eval())):
        raise UserError(
            f"timm's '{encoder.config.model}' does not hand out its tokens as Altsight's encoders do ({reason}): use "
            "another model, such as a ViT, a ResNet, ConvNeXt, Swin or EVA."
        )


@torch.no_grad()
def _differs(encoder: Encoder) -> str:
    side = encoder.config.img_size
    image = torch.linspace(-1, 1, 3 * side**2).view(1, 3, side, side)
    try:
        encoded = encoder(image)
        differ = (encoder.point(encoded, "pooled") - encoder.backbone(image)).abs().max().item()
    except (RuntimeError, AttributeError, IndexError, AssertionError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    if encoded.grid is None and encoded.patches.shape[1] != encoder.num_patches:
        return f"{encoded.patches.shape[1]} tokens for {encoder.num_patches} patches"
    return "" if differ <= 1e-4 else f"features differ by {differ:.1g}"


def timm_point(encoder: Encoder) -> FeaturePoint:
    """Return the feature point of what timm's own classifier would read."""
    vit = encoder.backbone
    plain = type(vit) is VisionTransformer and isinstance(vit.fc_norm, nn.Identity)
    if plain and vit.global_pool == "token":
        return "cls"
    return "mean" if plain and vit.global_pool == "avg" and not vit.pool_include_prefix else "pooled"
