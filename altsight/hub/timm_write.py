"""An encoder as a folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from altsight.core.config import write_json
from altsight.core.errors import UserError
from altsight.data.views import statistics
from altsight.evals.base import View
from altsight.hub.names import ratio_of
from altsight.hub.parity import largest, pictures
from altsight.hub.timm import ARGUMENTS, POINT, pretrained_cfg
from altsight.nn.backbone import TRANSFORMERS, family, has_fixed_size
from altsight.nn.encoder import Encoder

USAGE = """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.new("RGB", (320, 240), "orange")).unsqueeze(0)
with torch.inference_mode():
    features = {call}
print(features.shape)
"""
CLIP = "vit_base_patch16_clip_224"
"""timm's plain ViT with a norm before the blocks and 1e-5 in its layer norms, which no argument can name."""
READINGS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "head": ("model(image)", lambda model, image: model(image)),
    "cls": ("model.forward_features(image)[:, 0]", lambda model, image: model.forward_features(image)[:, 0]),
    "mean": (
        "model.forward_features(image)[:, model.num_prefix_tokens :].mean(dim=1)",
        lambda model, image: model.forward_features(image)[:, model.num_prefix_tokens :].mean(dim=1),
    ),
    "NCHW": (
        "model.forward_features(image).mean(dim=(2, 3))",
        lambda model, image: model.forward_features(image).mean(dim=(2, 3)),
    ),
    "NHWC": (
        "model.forward_features(image).mean(dim=(1, 2))",
        lambda model, image: model.forward_features(image).mean(dim=(1, 2)),
    ),
    "tokens": ("model.forward_features(image)", lambda model, image: model.forward_features(image)),
}
"""How the features of an export are read: the line of the snippet, and the same as a function."""


def write(view: View, folder: Path) -> None:
    """Write config.json and model.safetensors.

    Raises:
        UserError: timm has no model with all that this encoder has.
    """
    encoder = view.encoder
    if encoder.relative is None:
        architecture, arguments, state = encoder.config.model, _arguments(view), encoder.backbone.state_dict()
        if _is_clip(encoder):
            architecture, arguments = CLIP, arguments | _sizes(encoder)
    else:
        architecture, arguments, state = "beit_base_patch16_224", *_as_beit(encoder)
    preprocess = view.preprocess
    mean, std = statistics(preprocess.normalization)
    cfg = pretrained_cfg(architecture)
    cfg = {name: cfg[name] for name in ("pool_size", "first_conv", "classifier", "fixed_input_size") if name in cfg}
    cfg |= {
        "input_size": [3, preprocess.size, preprocess.size],
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_ratio,
        "crop_mode": "squash" if preprocess.squash else "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
    }
    config = {"architecture": architecture, "num_classes": 0, "num_features": encoder.width, "pretrained_cfg": cfg}
    write_json(folder / "config.json", config | {"model_args": arguments, POINT: view.feature_point})
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / "model.safetensors")


@torch.inference_mode()
def compare(view: View, folder: Path) -> dict[str, float]:
    """Load the folder with timm; return the largest differences of its tokens and of the features."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    encoder = view.encoder.eval()
    images = encoder.normalize(pictures(view).to(view.device))
    encoded = encoder(images)
    features = encoder.point(encoded, view.feature_point).cpu()
    theirs = model.forward_features(images.cpu())
    if encoded.grid is not None:
        theirs = theirs.flatten(1, 2) if _is_last(encoder) else theirs.flatten(2).mT
    differences = {"tokens": largest(encoded.tokens.cpu(), theirs)}
    kind = reading(view)
    if kind != "tokens":
        differences["features"] = largest(features, READINGS[kind][1](model, images.cpu()))
    return differences


def usage(view: View, folder: str) -> str:
    """Return Python code that reads features from the export in `folder`."""
    return USAGE.format(folder=folder, call=READINGS[reading(view)][0])


def reading(view: View) -> str:
    """Return the name in `READINGS` of what yields the view's features; "tokens" where timm hands out none of them."""
    encoder, point = view.encoder, view.feature_point
    if point.endswith("_prenorm"):
        return "tokens"
    if point == "pooled" or _chooses_pool(encoder) or (point == "cls" and encoder.relative is not None):
        return "head"
    if point == "cls" or encoder.prefix or encoder.is_vit:
        return point
    return "NHWC" if _is_last(encoder) else "NCHW"


def _is_last(encoder: Encoder) -> bool:
    return getattr(encoder.backbone, "output_fmt", "NCHW") == "NHWC"


def _chooses_pool(encoder: Encoder) -> bool:
    """Return whether timm's head can read either the class token or the mean: its last norm acts on every token."""
    vit = encoder.backbone
    plain = type(vit) is VisionTransformer and vit.attn_pool is None and isinstance(vit.fc_norm, nn.Identity)
    return plain and encoder.relative is None


def _arguments(view: View) -> dict[str, Any]:
    """Return what timm's model of this name is to be built with."""
    encoder, config = view.encoder, view.encoder.config
    named = {theirs: getattr(config, own) for theirs, own in ARGUMENTS.items()}
    if not has_fixed_size(config.model):
        del named["img_size"]
    if family(config.model) not in TRANSFORMERS:
        named = {name: value for name, value in named.items() if name == "img_size"}
    arguments = {name: value for name, value in named.items() if value not in (None, 0, False)}
    if config.quick_gelu:
        arguments["act_layer"] = "quick_gelu"
    if config.positions == "none":
        arguments["pos_embed"] = "none"
    if _chooses_pool(encoder) and view.feature_point in ("cls", "mean"):
        # Without fc_norm the last norm stays in front of the mean.
        token = view.feature_point == "cls"
        arguments |= {"global_pool": "token"} if token else {"global_pool": "avg", "fc_norm": False}
    return arguments


def _is_clip(encoder: Encoder) -> bool:
    plain = type(encoder.backbone) is VisionTransformer and encoder.config.norm_eps == 1e-5
    return plain and isinstance(encoder.backbone.norm_pre, nn.LayerNorm)


def _sizes(encoder: Encoder) -> dict[str, Any]:
    blocks = encoder.backbone.blocks
    sizes = {"patch_size": encoder.patch_size, "embed_dim": encoder.width, "num_heads": encoder.heads}
    return sizes | {"depth": len(blocks), "mlp_ratio": ratio_of(blocks[0].mlp.fc1.out_features, encoder.width)}


def _as_beit(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return arguments and weights of timm's BEiT that computes the same.

    A ViT with one table of relative positions is a BEiT whose blocks all have that table. BEiT's keys have no bias: one
    adds the same to every score of a query, which the softmax takes away.

    Raises:
        UserError: the encoder has what BEiT lacks.
    """
    config, relative = encoder.config, encoder.relative
    assert relative is not None
    if config.pre_norm or config.quick_gelu or encoder.prefix != 1 or encoder.backbone.pos_embed is not None:
        raise UserError(
            "timm has relative positions in BEiT only, which has a class token, no other positions, no norm before the "
            "blocks and the exact GELU: export to onnx or safetensors."
        )
    arguments = {theirs: getattr(config, own) for theirs, own in ARGUMENTS.items() if own in ("img_size", "patch_size")}
    arguments |= _sizes(encoder) | {"global_pool": "token"}
    table = relative.relative_position_bias_table
    state: dict[str, Tensor] = {}
    for name, value in encoder.backbone.state_dict().items():
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            state[name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = value
    for i in range(len(encoder.backbone.blocks)):
        state[f"blocks.{i}.attn.relative_position_bias_table"] = table.detach().clone()
        for gamma in (f"blocks.{i}.gamma_1", f"blocks.{i}.gamma_2"):
            state.setdefault(gamma, torch.ones(encoder.width))
    return arguments, state
