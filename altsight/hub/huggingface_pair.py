"""transformers' pair of timm's backbone and a text tower of CLIP's or SigLIP's: written, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.evals.base import Preprocess
from altsight.hub.dual import image_map
from altsight.hub.fill import check_served
from altsight.hub.huggingface_dual import joined, preprocess_in, scales, settings_of, text_names, text_tower
from altsight.hub.huggingface_forms import OTHERS, filled, siglip_text, split_out, text_kind, text_settings
from altsight.hub.model import Found, Model
from altsight.hub.names import Names, adopt, need_all
from altsight.hub.source import Source
from altsight.hub.timm import ARGUMENTS
from altsight.nn.backbone import has_fixed_size
from altsight.nn.encoder import Encoder, EncoderConfig, FeaturePoint
from altsight.nn.text import TextTower

MODEL_TYPE = "vision-text-dual-encoder"
POOLS: dict[FeaturePoint, dict[str, Any]] = {
    "cls": {"global_pool": "token"},
    # Without fc_norm timm would move the last norm behind the mean.
    "mean": {"global_pool": "avg", "fc_norm": False},
}
"""Feature point -> the arguments with which timm's head reads there."""
BACKBONE = "vision_model.timm_model"


def pair(model: Model, text: TextTower) -> Any:
    """Return transformers' VisionTextDualEncoderModel with the weights of `model`.

    Raises:
        UserError: the model has what this pair has not.
    """
    from transformers import CLIPTextConfig, SiglipTextConfig, TimmWrapperConfig
    from transformers import VisionTextDualEncoderConfig as PairConfig
    from transformers import VisionTextDualEncoderModel as Pair

    if model.logit_bias:
        raise UserError(f"transformers' pair of any image and text tower has no bias on its logits: {OTHERS}.")
    kind, width = text_kind(text), text.text_projection.out_features
    if kind == "siglip" and width != text.config.width:
        raise UserError(f"transformers' pair needs a joint space as wide as its text tower of SigLIP's: {OTHERS}.")
    vision: Any = TimmWrapperConfig(architecture=model.encoder.config.model, model_args=_arguments(model))
    # What the pair's map of images starts from; timm's models have no such setting.
    vision.hidden_size = model.encoder.width
    language = (CLIPTextConfig if kind == "clip" else SiglipTextConfig)(**text_settings(text))
    theirs = Pair(PairConfig.from_vision_text_configs(vision, language, projection_dim=width))
    state = model.encoder.backbone.state_dict()
    if model.joint_point in POOLS:
        # A pooling by attention that is not read is not built.
        state = {name: value for name, value in state.items() if not name.startswith("attn_pool.")}
    weights = {f"{BACKBONE}.{name}": value.cpu() for name, value in state.items()}
    weights["visual_projection.weight"] = image_map(model)
    if kind == "clip":
        return filled(theirs, weights | split_out(model, text_names(text, "clip")))
    # SigLIP's text tower ends in the map to the joint space, and the pair adds another.
    return filled(theirs, weights | siglip_text(model, text) | {"text_projection.weight": torch.eye(width)})


def recognises(source: Source) -> bool:
    """Return whether `source` is a folder of such a pair."""
    config = source.json("config.json")
    vision = config.get("vision_config") or {}
    return config.get("model_type") == MODEL_TYPE and vision.get("model_type") == "timm_wrapper"


def read(source: Source) -> Model:
    """Return the dual encoder at `source`.

    Raises:
        UserError: a setting has no counterpart here, or weights are missing.
    """
    config = source.json("config.json")
    kind = str(config["text_config"]["model_type"]).removesuffix("_text_model")
    if kind not in ("clip", "siglip"):
        raise UserError(f"the text tower of '{source.given}' is '{kind}', and Altsight reads CLIP's and SigLIP's only.")
    vision, language = config["vision_config"], settings_of(kind, config, "text")
    preprocess = preprocess_in(source, (vision.get("model_args") or {}).get("img_size", 0))
    encoder, point = _encoder(vision, preprocess)
    text = text_tower(kind, language, config["projection_dim"], str(source.path))
    model = Model(
        Found("a pair of timm's backbone and a text tower, of Hugging Face's transformers"),
        encoder,
        preprocess,
        point,
        text=text,
        image_projection=nn.Linear(encoder.width, config["projection_dim"], bias=False),
    )
    weights = _one_map(joined(source.weights))
    names: Names = {f"encoder.backbone.{name}": f"{BACKBONE}.{name}" for name in encoder.backbone.state_dict()}
    names |= text_names(text, kind) | {"image_projection.weight": "visual_projection.weight"}
    left, missing = adopt(model, weights, names)
    # A pooling that is not read is not in the file; it stays as it begins.
    unread = tuple(name for name in missing if ".attn_pool." in name and point in POOLS)
    need_all([name for name in missing if name not in unread], names, source.given)
    scales(model, weights, left)
    model.found = replace(model.found, missing=unread)
    return model


def _encoder(settings: Mapping[str, Any], preprocess: Preprocess) -> tuple[Encoder, FeaturePoint]:
    """Return the encoder of transformers' settings of a timm model, without weights, and where it is read."""
    arguments = dict(settings.get("model_args") or {})
    found: FeaturePoint = "pooled"
    for point, pool in POOLS.items():
        if pool.items() <= arguments.items():
            arguments = {name: value for name, value in arguments.items() if name not in pool}
            found = point
    changes: dict[str, Any] = {"img_size": preprocess.size, "normalization": preprocess.normalization}
    changes["quick_gelu"] = arguments.pop("act_layer", None) == "quick_gelu"
    changes["positions"] = "none" if arguments.pop("pos_embed", None) == "none" else "learned"
    unknown = arguments.keys() - ARGUMENTS.keys()
    if unknown:
        raise UserError(
            f"timm's {', '.join(sorted(unknown))} in the settings of the images has no counterpart in Altsight."
        )
    changes |= {ARGUMENTS[name]: value for name, value in arguments.items()}
    encoder = Encoder(EncoderConfig(model=settings["architecture"], **changes))
    check_served(encoder)
    return encoder, found


def _one_map(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` with SigLIP's map to the joint space and the pair's as one."""
    found = dict(weights)
    if "text_model.head.weight" in found:
        last = found.pop("text_projection.weight")
        found |= {f"text_model.head.{kind}": last @ weights[f"text_model.head.{kind}"] for kind in ("weight", "bias")}
    return found


def _arguments(model: Model) -> dict[str, Any]:
    """Return what timm needs, besides the name, to build the backbone with the pooling at the joint point.

    Raises:
        UserError: it takes something that is no plain value.
    """
    encoder, config = model.encoder, model.encoder.config
    if encoder.relative is not None:
        raise UserError(
            f"timm has no bias by relative position that all blocks share, which this encoder has: {OTHERS}."
        )
    if config.norm_eps is not None:
        raise UserError(f"timm's settings in a file cannot name the {config.norm_eps} in the layer norms: {OTHERS}.")
    if encoder.is_vit and model.joint_point in POOLS and not isinstance(encoder.backbone.norm, nn.LayerNorm):
        raise UserError(f"timm's heads read no tokens without a norm, as this model does: {OTHERS}.")
    if not encoder.is_vit:
        return {"img_size": config.img_size} if has_fixed_size(config.model) else {}
    settings = {theirs: getattr(config, own) for theirs, own in ARGUMENTS.items()}
    settings["act_layer"] = "quick_gelu" if config.quick_gelu else None
    settings["pos_embed"] = "none" if config.positions == "none" else None
    settings |= POOLS.get(model.joint_point, {})
    return {name: value for name, value in settings.items() if value or name == "fc_norm"}
