"""A dual encoder as a model of transformers in memory: its CLIP or its SigLIP, and which form fits."""

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
    """Return the form of transformers that fits: "clip", "siglip", or "pair" for its pair of any two models."""
    encoder, backbone = model.encoder, model.encoder.backbone
    normed = is_plain(encoder) and isinstance(backbone.norm, nn.LayerNorm)
    if not normed or encoder.config.layer_scale is not None or encoder.prefix > 1:
        return "pair"
    normed_first = isinstance(backbone.norm_pre, nn.LayerNorm)
    if text_kind(text) == "clip":
        fits = normed_first and encoder.prefix == 1 and model.joint_point == "cls" and not model.logit_bias
        return "clip" if fits else "pair"
    attentive = isinstance(backbone.attn_pool, AttentionPoolLatent) and model.joint_point == "pooled"
    fits = attentive and not normed_first and encoder.prefix == 0 and model.image_projection is None
    return "siglip" if fits else "pair"


def clip(model: Model, text: TextTower) -> Any:
    """Return transformers' CLIPModel with the weights of `model`."""
    from transformers import CLIPConfig, CLIPModel

    width = text.text_projection.out_features
    config = CLIPConfig(text_config=text_settings(text), vision_config=_vision_settings(model), projection_dim=width)
    weights = split_out(model, image_names(model.encoder, "clip"))
    name = "vision_model.embeddings.class_embedding"
    return filled(
        CLIPModel(config),
        weights
        | {name: weights[name].flatten(), POSITIONS: position_table(model.encoder)}
        | {"visual_projection.weight": image_map(model)}
        | split_out(model, text_names(text, "clip")),
    )


def siglip(model: Model, text: TextTower) -> Any:
    """Return transformers' SiglipModel with the weights of `model`."""
    from transformers import SiglipConfig, SiglipModel

    language = text_settings(text) | {"projection_size": text.text_projection.out_features}
    theirs = SiglipModel(SiglipConfig(text_config=language, vision_config=_vision_settings(model)))
    theirs.logit_bias.data.fill_(model.logit_bias)
    weights = split_out(model, image_names(model.encoder, "siglip"))
    weights[POSITIONS] = position_table(model.encoder, with_bias=False)
    return filled(theirs, weights | siglip_text(model, text))


def split_out(model: Model, names: Names) -> dict[str, Tensor]:
    """Return weights under transformers' names; positions and the map of images are left to the caller."""
    left = ("encoder.backbone.pos_embed", "image_projection.weight")
    return split(handed_out(model, {own: other for own, other in names.items() if own not in left}))


def siglip_text(model: Model, text: TextTower) -> dict[str, Tensor]:
    """Return the weights of a text tower of SigLIP's."""
    weights = split_out(model, text_names(text, "siglip"))
    # SigLIP's map has a bias.
    return {"text_model.head.bias": torch.zeros(text.text_projection.out_features)} | weights


def filled(theirs: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return the library's model with `weights`, which are all that it has but for scale and bias of the logits."""
    kept = {name: theirs.state_dict()[name] for name in ("logit_scale", "logit_bias") if name in theirs.state_dict()}
    theirs.load_state_dict({**kept, **weights})
    return theirs


def text_settings(text: TextTower) -> dict[str, Any]:
    """Return the settings of a text tower of CLIP's or SigLIP's."""
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
