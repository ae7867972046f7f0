"""Dual encoders as folders that OpenCLIP loads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from altsight.core.config import write_json
from altsight.core.errors import UserError
from altsight.data.views import statistics
from altsight.evals.base import View
from altsight.hub.dual import (
    Foreign,
    as_model,
    differences,
    image_map,
    is_plain,
    need_plain_map,
    need_tower,
    norm_eps,
    position_table,
)
from altsight.hub.hf_tokenizer import fast_tokenizer
from altsight.hub.model import Model
from altsight.hub.names import handed_out, ratio_of
from altsight.hub.openclip import CONFIG
from altsight.hub.openclip_towers import text_names, transposed, trunk_names, vit_names
from altsight.nn.backbone import has_fixed_size
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextTower

WEIGHTS = "open_clip_model.safetensors"
USAGE = """import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
image = preprocess(Image.new("RGB", (320, 240), "orange")).unsqueeze(0)
with torch.inference_mode():
    images = model.encode_image(image, normalize=True)
    texts = model.encode_text(tokenizer(["an orange square", "a photo of a dog"]), normalize=True)
print(images @ texts.T)
"""
OTHERS = "export it to huggingface or onnx instead"


def write(view: View, folder: Path) -> None:
    """Write the dual encoder of `view` to `folder`, which exists.

    Raises:
        UserError: OpenCLIP has no such model; the message says what it lacks. Nothing is written then.
    """
    model = as_model(view)
    text = need_tower(model, "OpenCLIP")
    if model.preprocess.crop_ratio != 1:
        raise UserError(f"OpenCLIP cuts the centre at the size of the image, not at a ratio of it: {OTHERS}.")
    own = _reason_against_own(model, text)
    vision, weights = _own_tower(model) if not own else _trunk(model, own)
    language = _language(text)
    names = text_names(text, "")
    weights |= handed_out(model, names, transposed(names))
    weights["logit_scale"] = torch.tensor(math.log(model.logit_scale))
    settings: dict[str, Any] = {
        "embed_dim": text.text_projection.out_features,
        "quick_gelu": text.config.quick_gelu,
        "vision_cfg": vision,
        "text_cfg": language,
    }
    if model.logit_bias:
        settings["init_logit_bias"] = model.logit_bias
        weights["logit_bias"] = torch.tensor(model.logit_bias)
    if "hf_tokenizer_name" in language:
        fast_tokenizer(text.tokenizer, text.context, text.config.pad_with_end).save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, {"model_cfg": settings, "preprocess_cfg": _preprocess(model)})


def compare(view: View, folder: Path) -> dict[str, float]:
    """Load the folder with OpenCLIP; return the largest differences of what it computes."""
    return differences(view, load_back(folder))


def usage(view: View, folder: str) -> str:
    """Return Python code that compares an image with texts by the export in `folder`."""
    return USAGE.format(folder=folder)


def load_back(folder: Path) -> Foreign:
    """Return what OpenCLIP makes of the folder that `write` wrote."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    @torch.inference_mode()
    def text(texts: Sequence[str]) -> Tensor:
        vectors: Tensor = model.encode_text(tokenizer(list(texts)))
        return vectors

    bias = 0.0 if model.logit_bias is None else model.logit_bias.item()
    return Foreign(torch.inference_mode()(model.encode_image), text, model.logit_scale.exp().item(), bias)


def _reason_against_own(model: Model, text: TextTower) -> str:
    """Return why OpenCLIP's own vision transformer cannot be this image tower; "" if it can."""
    encoder, config = model.encoder, model.encoder.config
    if not is_plain(encoder) or encoder.backbone.cls_token is None:
        return f"its own image tower is a plain vision transformer with a class token, not '{config.model}'"
    if encoder.prefix != 1:
        return "its own image tower has no registers"
    if _activation(encoder) != ("QuickGELU" if text.config.quick_gelu else "GELU"):
        return (
            f"its own towers share one activation, and here it is {_activation(encoder)} for images and "
            f"{'QuickGELU' if text.config.quick_gelu else 'GELU'} for texts"
        )
    if model.joint_point in ("cls", "mean") and not isinstance(encoder.backbone.norm, nn.LayerNorm):
        return "its own image tower ends in a norm of every token"
    if model.joint_point not in ("cls", "mean") and not _normed_behind(model):
        return (
            f"its own image tower is read at the class token or the mean of the patches, not at '{model.joint_point}'"
        )
    return ""


def _own_tower(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return OpenCLIP's settings of its own vision transformer, and the weights."""
    need_plain_map(model, "OpenCLIP")
    encoder, backbone = model.encoder, model.encoder.backbone
    behind = _normed_behind(model)
    settings = {
        "image_size": encoder.config.img_size,
        "patch_size": encoder.patch_size,
        "width": encoder.width,
        "layers": len(backbone.blocks),
        "head_width": encoder.width // encoder.heads,
        "mlp_ratio": _ratio(backbone.blocks, encoder.width),
        "ls_init_value": encoder.config.layer_scale,
        "no_ln_pre": not isinstance(backbone.norm_pre, nn.LayerNorm),
        "pool_type": "tok" if model.joint_point == "cls" else "avg",
        "final_ln_after_pool": behind,
        "norm_kwargs": {"eps": norm_eps(encoder)},
    }
    names = vit_names(encoder, last_norm="fc_norm" if behind else "norm")
    del names["image_projection.weight"], names["encoder.backbone.pos_embed"]
    weights = handed_out(model, names)
    weights["visual.class_embedding"] = weights["visual.class_embedding"].flatten()
    weights["visual.positional_embedding"] = position_table(encoder)
    weights["visual.proj"] = image_map(model).T.contiguous()
    return settings, weights


def _trunk(model: Model, reason: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return OpenCLIP's settings of an image tower of timm, and the weights; `reason` against its own is given."""
    config, backbone = model.encoder.config, model.encoder.backbone
    if not _is_timms(model.encoder):
        raise UserError(
            f"OpenCLIP cannot hold this model: {reason}; and of timm's it builds '{config.model}' at timm's own size "
            f"only. So {OTHERS}."
        )
    need_plain_map(model, "OpenCLIP")
    pools = {"cls": "token", "mean": "avg", "pooled": getattr(backbone, "global_pool", "")}
    attentive = pools[model.joint_point] == "map"
    settings = {
        "timm_model_name": config.model,
        "timm_pool": "map" if attentive else "" if model.joint_point == "pooled" else pools[model.joint_point],
        "timm_proj": "none" if attentive else "linear",
        "image_size": config.img_size,
    }
    if attentive and model.image_projection is not None:
        raise UserError(f"OpenCLIP has no matrix behind a pooling by attention, which this model has: {OTHERS}.")
    # A pooling by attention that nobody reads is not built.
    names = {own: other for own, other in trunk_names(model.encoder).items() if attentive or ".attn_pool." not in own}
    weights = handed_out(model, names)
    if not attentive:
        weights["visual.head.proj.weight"] = image_map(model)
    return settings, weights


def _is_timms(encoder: Encoder) -> bool:
    """Return whether timm builds this backbone by its name alone, but for a pooling by attention."""
    config = encoder.config
    # What matters in training only, and what the weights hold.
    free = {name: getattr(config, name) for name in ("drop_path", "init", "positions", "global_pool", "normalization")}
    named = EncoderConfig(model=config.model, img_size=config.img_size, **free)
    any_size = not encoder.is_vit and not has_fixed_size(config.model)
    return (
        config == named
        and config.positions != "none"
        and config.global_pool in (None, "map")
        and (any_size or _timms_size(config.model) == config.img_size)
    )


def _timms_size(model: str) -> int:
    settings: Any = timm.get_pretrained_cfg(model)
    return int(settings.input_size[-1])


def _language(text: TextTower) -> dict[str, Any]:
    """Return OpenCLIP's settings of the text tower."""
    config, tokenizer = text.config, text.tokenizer
    settings: dict[str, Any] = {
        "context_length": config.context,
        "vocab_size": text.token_embedding.num_embeddings,
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        "mlp_ratio": _ratio(text.blocks, config.width),
        "no_causal_mask": not config.causal,
        "pool_type": {"end": "eos", "first": "first", "last": "last"}[config.pool],
        "eos_id": tokenizer.end,
        "proj_bias": text.text_projection.bias is not None,
        "norm_kwargs": {"eps": config.norm_eps},
    }
    if config.tanh_gelu:
        settings["act_kwargs"] = {"approximate": "tanh"}
    clean = tokenizer.rules.clean
    if tokenizer.rules.special != "words":
        # OpenCLIP looks in the folder whatever the name is, and repairs every text at least.
        settings["hf_tokenizer_name"] = "in this folder"
        clean = "whitespace" if clean == "none" else "canonicalize" if clean == "letters" else clean
    return settings | {"tokenizer_kwargs": {"clean": clean}}


def _preprocess(model: Model) -> dict[str, Any]:
    mean, std = statistics(model.preprocess.normalization)
    return {
        "size": model.preprocess.size,
        "mode": "RGB",
        "mean": list(mean),
        "std": list(std),
        "interpolation": model.preprocess.interpolation,
        "resize_mode": "squash" if model.preprocess.squash else "shortest",
    }


def _activation(encoder: Encoder) -> str:
    return type(encoder.backbone.blocks[0].mlp.act).__name__


def _normed_behind(model: Model) -> bool:
    """Return whether the mean of the patches is taken before the last norm (CLIPA)."""
    backbone = model.encoder.backbone
    return (
        model.joint_point == "pooled"
        and getattr(backbone, "global_pool", "") == "avg"
        and isinstance(getattr(backbone, "fc_norm", None), nn.LayerNorm)
    )


def _ratio(blocks: Any, width: int) -> float:
    return ratio_of(int(blocks[0].mlp.fc1.out_features), width)
