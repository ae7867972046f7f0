"""OpenAI's ResNets with attention pooling, as timm's models of that kind; OpenCLIP holds them under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from timm.models.byobnet import checkpoint_filter_fn
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.hub.names import Names
from altsight.nn.encoder import Encoder, EncoderConfig

MODELS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}
"""Blocks in the four stages -> timm's model."""


def resnet(
    settings: Mapping[str, Any], embed_dim: int, normalization: str, given: Iterable[str]
) -> tuple[Encoder, nn.Linear, Names]:
    """Return the ResNet of OpenCLIP's `vision_cfg` without weights, its map to the joint space, and the names of both.

    The attention pooling is timm's head, so the place where images are read is "pooled".

    Args:
        given: names of the weights that there are.

    Raises:
        UserError: OpenAI has no ResNet of this size.
    """
    layers = tuple(settings["layers"])
    if layers not in MODELS:
        raise UserError(
            f"OpenAI has no ResNet with {layers} blocks, and Altsight knows its own only: use another model."
        )
    size = int(settings.get("image_size", 224))
    config = EncoderConfig(model=MODELS[layers], img_size=size, normalization=normalization)
    encoder = Encoder(config)
    # timm renames what it is given: here the names themselves.
    themselves: dict[str, Any] = {name: name for name in given}
    renamed = checkpoint_filter_fn(themselves, encoder.backbone)
    names: Names = {f"encoder.backbone.{own}": str(other) for own, other in renamed.items()}
    for kind in ("weight", "bias"):
        names[f"image_projection.{kind}"] = names.pop(
            f"encoder.backbone.head.proj.{kind}", f"visual.attnpool.c_proj.{kind}"
        )
    expected = {f"encoder.backbone.{own}" for own in encoder.backbone.state_dict()}
    return encoder, nn.Linear(encoder.width, embed_dim), {name: name for name in expected} | names


def settings_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return OpenCLIP's `vision_cfg` of a ResNet, read off its weights."""
    stages = [{name.split(".")[2] for name in weights if name.startswith(f"visual.layer{i}.")} for i in (1, 2, 3, 4)]
    side = round((len(weights["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    return {
        "layers": [len(stage) for stage in stages],
        "width": len(weights["visual.layer1.0.conv1.weight"]),
        "image_size": 32 * side,
    }
