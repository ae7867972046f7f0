"""LCL's checkpoints (Yang et al. 2024; specification LCL 2.2): OpenCLIP's ViT, and what reads its patch tokens."""

from __future__ import annotations

import math

from altsight.evals.base import Preprocess
from altsight.hub.fill import filled
from altsight.hub.guess import heads_of
from altsight.hub.model import Found, Model
from altsight.hub.source import Source
from altsight.hub.timm import converted
from altsight.nn.encoder import EncoderConfig


def recognises(source: Source) -> bool:
    """Return whether `source` is a file of LCL's: a dual encoder of OpenCLIP with LCL's pooling."""
    if source.scheme or source.json("config.json") or source.json("open_clip_config.json"):
        return False
    return any(name.removeprefix("module.").startswith("pool_project.") for name in source.weights)


def read(source: Source) -> Model:
    """Return the image encoder, which is what LCL keeps; its features are the mean of the patch tokens.

    Raises:
        UserError: weights are missing.
    """
    weights = {name.removeprefix("module."): value for name, value in source.weights.items()}
    visual = {name: value for name, value in weights.items() if name.startswith("visual.")}
    width, patch = visual["visual.conv1.weight"].shape[0], visual["visual.conv1.weight"].shape[-1]
    side = math.isqrt(visual["visual.positional_embedding"].shape[0] - 1)
    layers = {name.split(".")[3] for name in visual if name.startswith("visual.transformer.resblocks.")}
    config = EncoderConfig(
        "vit_base_patch16_clip_224",
        img_size=side * patch,
        patch_size=patch,
        width=width,
        depth=len(layers),
        heads=heads_of(width),
        positions="learned",
        normalization="clip",
    )
    encoder, left = filled(config, converted(visual, config), source.given)
    beside = {name for name in weights if not name.startswith("visual.")}
    found = Found("LCL's image encoder; its language model is left aside", tuple(sorted({*left, *beside})))
    # LCL's own pooling and its language model read the patch tokens, never the class token.
    return Model(found, encoder, Preprocess(config.img_size, "clip"), "mean")
