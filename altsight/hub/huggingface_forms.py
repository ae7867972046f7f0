"""A dual encoder as a model of transformers in memory: its CLIP, its SigLIP, or its pair of any two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.hub.dual import image_map, is_plain, norm_eps, position_table
from altsight.hub.huggingface_dual import image_names, split, text_names
from altsight.hub.model import Model
from altsight.hub.names import Names, handed_out
from altsight.nn.backbone import has_fixed_size
from altsight.nn.text import TextTower

ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}
"""Class of an activation -> transformers' name."""
OTHERS = "export it to openclip or onnx instead"
POSITIONS = "vision_model.embeddings.position_embedding.weight"


def text_kind(text: TextTower) -> str:
    """Return which text tower of transformers this is: "clip" or "siglip".

    Raises:
        UserError: neither.
    """
    config = text.config
    if config.causal and config.pool == "end" and text.text_projection.bias is None:
        return "clip"
    if not config.causal and config.pool == "last":
        return "siglip"
    raise UserError(
        "transformers' text towers read from left to right up to the end token (CLIP), or both ways and are read at "
        f"the last token (SigLIP), not like this one, which is read at '{config.pool}' with causal = {config.causal}"
        f"{' and a bias' * config.projection_bias}: {OTHERS}."
    )


def form_of(model: Model, text: TextTower) -> str:
    """Return the form of transformers that fits: "clip", "siglip", or "any" for its pair of any two models."""
    encoder, backbone = model.encoder, model.encoder.backbone
    if not is_plain(encoder) or encoder.config.layer_scale is not None or encoder.prefix > 1:
        return "any"
    normed = isinstance(backbone.norm_pre, nn.LayerNorm)
    if text_kind(text) == "clip":
        fits = normed and encoder.prefix == 1 and model.joint_point == "cls" and not model.logit_bias
        return "clip" if fits else "any"
    attentive = isinstance(backbone.attn_pool, AttentionPoolLatent) and model.joint_point == "pooled"
    return "siglip" if attentive and not normed and encoder.prefix == 0 and model.image_projection is None else "any"


def clip(model: Model, text: TextTower) -> Any:
    """Return transformers' CLIPModel with the weights of `model`."""
    from transformers import CLIPConfig, CLIPModel

    width = text.text_projection.out_features
    config = CLIPConfig(text_config=_text_settings(text), vision_config=_vision_settings(model), projection_dim=width)
    weights = _handed_out(model, image_names(model.encoder, "clip"))
    name = "vision_model.embeddings.class_embedding"
    return _filled(
        CLIPModel(config),
        weights
        | {name: weights[name].flatten(), POSITIONS: position_table(model.encoder)}
        | {"visual_projection.weight": image_map(model)}
        | _handed_out(model, text_names(text, "clip")),
    )


def siglip(model: Model, text: TextTower) -> Any:
    """Return transformers' SiglipModel with the weights of `model`."""
    from transformers import SiglipConfig, SiglipModel

    language = _text_settings(text) | {"projection_size": text.text_projection.out_features}
    theirs = SiglipModel(SiglipConfig(text_config=language, vision_config=_vision_settings(model)))
    theirs.logit_bias.data.fill_(model.logit_bias)
    weights = _handed_out(model, image_names(model.encoder, "siglip"))
    weights[POSITIONS] = position_table(model.encoder, with_bias=False)
    return _filled(theirs, weights | _siglip_text(model, text))


def any_two(model: Model, text: TextTower) -> Any:
    """Return transformers' VisionTextDualEncoderModel of timm's backbone and a text tower of CLIP's or SigLIP's.

    Raises:
        UserError: the model has what this pair has not.
    """
    from transformers import CLIPTextConfig, SiglipTextConfig, TimmWrapperConfig
    from transformers import VisionTextDualEncoderConfig as PairConfig
    from transformers import VisionTextDualEncoderModel as Pair

    if model.logit_bias:
        raise UserError(f"transformers' pair of any image and text tower has no bias on its logits: {OTHERS}.")
    kind, language = text_kind(text), _text_settings(text)
    width = text.text_projection.out_features
    vision: Any = TimmWrapperConfig(architecture=model.encoder.config.model, model_args=_timm_arguments(model))
    # What the pair's map of images starts from; timm's models have no such setting.
    vision.hidden_size = model.encoder.width
    towers = CLIPTextConfig(**language) if kind == "clip" else SiglipTextConfig(**language)
    theirs = Pair(PairConfig.from_vision_text_configs(vision, towers, projection_dim=width))
    backbone = {f"vision_model.timm_model.{k}": v.cpu() for k, v in model.encoder.backbone.state_dict().items()}
    weights = backbone | {"visual_projection.weight": image_map(model)}
    if kind == "clip":
        return _filled(theirs, weights | _handed_out(model, text_names(text, "clip")))
    if width != text.config.width:
        raise UserError(f"transformers' pair needs a joint space as wide as its text tower of SigLIP's: {OTHERS}.")
    # SigLIP's text tower ends in the map to the joint space, and the pair adds another.
    return _filled(theirs, weights | _siglip_text(model, text) | {"text_projection.weight": torch.eye(width)})


def _handed_out(model: Model, names: Names) -> dict[str, Tensor]:
    """Return weights under transformers' names; positions and the map of images are left to the caller."""
    left = ("encoder.backbone.pos_embed", "image_projection.weight")
    return split(handed_out(model, {own: other for own, other in names.items() if own not in left}))


def _siglip_text(model: Model, text: TextTower) -> dict[str, Tensor]:
    weights = _handed_out(model, text_names(text, "siglip"))
    # SigLIP's map has a bias.
    return {"text_model.head.bias": torch.zeros(text.text_projection.out_features)} | weights


def _filled(theirs: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return the library's model with `weights`, which are all that it has but for scale and bias of the logits."""
    kept = {name: theirs.state_dict()[name] for name in ("logit_scale", "logit_bias") if name in theirs.state_dict()}
    theirs.load_state_dict({**kept, **weights})
    return theirs


def _text_settings(text: TextTower) -> dict[str, Any]:
    config, block = text.config, _block(text.blocks)
    return {
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": config.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": ACTIVATIONS[type(block.mlp.act).__name__],
        "layer_norm_eps": config.norm_eps,
        "bos_token_id": text.tokenizer.start,
        "eos_token_id": text.tokenizer.end,
        "pad_token_id": text.tokenizer.end if config.pad_with_end else text.tokenizer.pad,
    }


def _vision_settings(model: Model) -> dict[str, Any]:
    encoder, blocks = model.encoder, model.encoder.backbone.blocks
    block = _block(blocks)
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": encoder.heads,
        "image_size": encoder.config.img_size,
        "patch_size": encoder.patch_size,
        "hidden_act": ACTIVATIONS[type(block.mlp.act).__name__],
        "layer_norm_eps": norm_eps(encoder),
    }


def _block(blocks: Any) -> Any:
    """Return the first of the blocks, which are all alike."""
    return blocks[0]


def _timm_arguments(model: Model) -> dict[str, Any]:
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
    if not encoder.is_vit:
        return {"img_size": config.img_size} if has_fixed_size(config.model) else {}
    settings = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "init_values": config.layer_scale,
        "reg_tokens": config.registers or None,
        "pre_norm": config.pre_norm or None,
        "act_layer": "quick_gelu" if config.quick_gelu else None,
        "pos_embed": "none" if config.positions == "none" else None,
        "global_pool": {"cls": "token", "mean": "avg"}.get(model.joint_point, config.global_pool),
        # Without this, timm would move the last norm behind the mean.
        "fc_norm": False if model.joint_point == "mean" else None,
    }
    return {name: value for name, value in settings.items() if value is not None}
