"""Dual encoders of Hugging Face's transformers as the toolkit's own: CLIP, SigLIP, and SigLIP 2 of one resolution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.data.clean import Clean
from altsight.data.views import normalization_of, statistics
from altsight.evals.base import Preprocess
from altsight.hub.hf_tokenizer import hf_tokenizer
from altsight.hub.model import Found, Model
from altsight.hub.names import Names, adopt, block_names, linear, need_all, ratio_of
from altsight.hub.source import Source, parse
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig, TextTower

KINDS = ("clip", "siglip")
"""model_type in config.json."""
BLOCK = {
    "norm1.": "layer_norm1.",
    "attn.qkv.weight": "self_attn.qkv.weight",
    "attn.qkv.bias": "self_attn.qkv.bias",
    "attn.proj.": "self_attn.out_proj.",
    "norm2.": "layer_norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
"""Parts of a transformer block: own name -> transformers' name, once `joined` has made one map of q, k and v."""
TRUNKS = {"gelu": "vit_base_patch16_siglip_224", "gelu_pytorch_tanh": "vit_base_patch32_siglip_256"}
"""hidden_act -> a model of timm with SigLIP's parts and that activation; every size is set."""
FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""What is fetched from the hub."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


def recognises(source: Source) -> bool:
    """Return whether `source` is a folder of transformers' CLIP or SigLIP, or such a model on its hub."""
    if source.scheme == "hf" and source.path is None:
        source = fetched(source)
    return source.scheme in ("", "hf") and source.json("config.json").get("model_type") in KINDS


def read(source: Source) -> Model:
    """Return the dual encoder at `source`; fp16 weights become fp32.

    Raises:
        UserError: it cannot be fetched, a setting has no counterpart here, or weights are missing.
    """
    if source.scheme == "hf" and source.path is None:
        source = fetched(source)
    config, folder = source.json("config.json"), str(source.path)
    kind = config["model_type"]
    vision, language = (settings_of(kind, config, part) for part in ("vision", "text"))
    preprocess = preprocess_in(source, vision["image_size"], "clip" if kind == "clip" else "half")
    embed_dim: int = config.get("projection_dim", 512) if kind == "clip" else language["projection_size"]
    text = text_tower(kind, language, embed_dim, folder)
    model = Model(
        Found(f"{'CLIP' if kind == 'clip' else 'SigLIP'} of Hugging Face's transformers"),
        _encoder(kind, vision, preprocess.normalization),
        preprocess,
        "cls" if kind == "clip" else "pooled",
        text=text,
        image_projection=nn.Linear(vision["hidden_size"], embed_dim, bias=False) if kind == "clip" else None,
    )
    names = image_names(model.encoder, kind) | text_names(text, kind)
    weights = joined(source.weights)
    left, missing = adopt(model, weights, names)
    need_all(missing, names, source.given)
    scales(model, weights, left)
    return model


def scales(model: Model, weights: Mapping[str, Tensor], left: Iterable[str]) -> None:
    """Give `model` the scale and bias of the logits, and what is `left` of the weights."""
    model.logit_scale = float(weights["logit_scale"].exp()) if "logit_scale" in weights else 100.0
    model.logit_bias = float(weights.get("logit_bias", torch.zeros(())))
    unused = tuple(name for name in left if not name.endswith((".position_ids", "logit_scale", "logit_bias")))
    model.found = replace(model.found, left_over=unused)


def fetched(source: Source) -> Source:
    """Return the folder of "hf:ORG/NAME", downloaded or from the cache.

    Raises:
        UserError: it cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(source.model, allow_patterns=list(FILES))
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{source.model}' cannot be fetched from the Hugging Face hub ({reason}): connect to a network, or give "
            "the folder of a download."
        ) from None
    return parse(folder)


def image_names(encoder: Encoder, kind: str) -> Names:
    """Return the names of the image side of transformers' "clip" or "siglip", as `joined` has them."""
    own, other = "encoder.backbone", "vision_model"
    names = {
        f"{own}.pos_embed": f"{other}.embeddings.position_embedding.weight",
        f"{own}.patch_embed.proj.weight": f"{other}.embeddings.patch_embedding.weight",
    }
    names |= linear(f"{own}.norm", f"{other}.post_layernorm")
    names |= block_names(f"{own}.blocks", f"{other}.encoder.layers", len(encoder.backbone.blocks), BLOCK)
    if kind == "clip":
        names |= {f"{own}.cls_token": f"{other}.embeddings.class_embedding"}
        # Misspelt in transformers.
        names |= linear(f"{own}.norm_pre", f"{other}.pre_layrnorm")
        return names | {"image_projection.weight": "visual_projection.weight"}
    names |= {f"{own}.patch_embed.proj.bias": f"{other}.embeddings.patch_embedding.bias"}
    return names | _head_names(f"{own}.attn_pool", f"{other}.head")


def text_names(tower: TextTower, kind: str) -> Names:
    """Return the names of the text side of transformers' "clip" or "siglip", as `joined` has them."""
    own, other = "text", "text_model"
    names = {
        f"{own}.token_embedding.weight": f"{other}.embeddings.token_embedding.weight",
        f"{own}.positional_embedding": f"{other}.embeddings.position_embedding.weight",
    }
    names |= linear(f"{own}.ln_final", f"{other}.final_layer_norm")
    names |= block_names(f"{own}.blocks", f"{other}.encoder.layers", len(tower.blocks), BLOCK)
    if kind == "clip":
        return names | {f"{own}.text_projection.weight": "text_projection.weight"}
    return names | linear(f"{own}.text_projection", f"{other}.head", bias=tower.text_projection.bias is not None)


def _head_names(own: str, other: str) -> Names:
    """Return the names of SigLIP's pooling by attention."""
    parts = {"q": "attention.q", "kv": "attention.kv", "proj": "attention.out_proj", "norm": "layernorm"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names = {f"{own}.latent": f"{other}.probe"}
    for mine, theirs in parts.items():
        names |= linear(f"{own}.{mine}", f"{other}.{theirs}")
    return names


def joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` with the maps to q, k and v of every block as one, and the pooling's one map as q and kv."""
    found = dict(weights)
    for name in weights:
        if ".self_attn.q_proj." in name:
            parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            found[name.replace("q_proj", "qkv")] = torch.cat(parts)
        if ".head.attention.in_proj_" in name:
            stem, kind = name.removesuffix("weight").removesuffix("bias"), name.rsplit("_", 1)[1]
            query, key, value = found.pop(name).chunk(3)
            stem = stem.removesuffix("in_proj_")
            found |= {f"{stem}q.{kind}": query, f"{stem}kv.{kind}": torch.cat([key, value])}
    return found


def split(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `joined`."""
    found = dict(weights)
    for name in weights:
        if ".self_attn.qkv." in name:
            for part, value in zip("qkv", found.pop(name).chunk(3), strict=True):
                found[name.replace("qkv", f"{part}_proj")] = value.clone()
        if ".head.attention.q." in name:
            query, keys_values = found.pop(name), found.pop(name.replace(".q.", ".kv."))
            found[name.replace(".q.", ".in_proj_")] = torch.cat([query, keys_values])
    return found


def settings_of(kind: str, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the settings of a tower, those that config.json leaves out at the library's defaults.

    Raises:
        UserError: one of the settings has no counterpart here.
    """
    from transformers import CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig, SiglipVisionConfig

    kinds = {"cliptext": CLIPTextConfig, "clipvision": CLIPVisionConfig}
    kinds |= {"sigliptext": SiglipTextConfig, "siglipvision": SiglipVisionConfig}
    settings: dict[str, Any] = kinds[kind + part](**(config.get(f"{part}_config") or {})).to_dict()
    if settings["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"the activation '{settings['hidden_act']}' of {part}_config has no counterpart in Altsight.")
    if part == "vision" and not settings.get("vision_use_head", True):
        raise UserError("this SigLIP has no pooling (vision_use_head is false), so it is no dual encoder: use another.")
    return settings


def _encoder(kind: str, settings: Mapping[str, Any], normalization: str) -> Encoder:
    activation = settings["hidden_act"]
    if kind == "clip" and activation == "gelu_pytorch_tanh":
        raise UserError("CLIP with the activation 'gelu_pytorch_tanh' has no counterpart in Altsight.")
    if kind == "siglip" and activation == "quick_gelu":
        raise UserError("SigLIP with the activation 'quick_gelu' has no counterpart in Altsight.")
    return Encoder(
        EncoderConfig(
            model="vit_base_patch16_224" if kind == "clip" else TRUNKS[activation],
            img_size=settings["image_size"],
            patch_size=settings["patch_size"],
            width=settings["hidden_size"],
            depth=settings["num_hidden_layers"],
            heads=settings["num_attention_heads"],
            mlp_ratio=ratio_of(settings["intermediate_size"], settings["hidden_size"]),
            positions="learned",
            pre_norm=kind == "clip",
            quick_gelu=activation == "quick_gelu",
            norm_eps=settings["layer_norm_eps"],
            normalization=normalization,
        )
    )


def text_tower(kind: str, settings: Mapping[str, Any], embed_dim: int, folder: str) -> TextTower:
    """Return the text tower of transformers' "clip" or "siglip", without weights; its tokenizer is in `folder`.

    Raises:
        UserError: the tokenizer is missing, or of another model.
    """
    clean: Clean = "letters" if kind == "siglip" and _cleans(Path(folder)) else "none"
    tokenizer = hf_tokenizer(folder, clean)
    clip = kind == "clip"
    # Old configurations of CLIP say 2 and mean the highest id.
    end = settings["vocab_size"] - 1 if settings["eos_token_id"] == 2 else settings["eos_token_id"]
    if clip and end != tokenizer.end:
        raise UserError(
            f"the tokenizer in '{folder}' ends texts with token {tokenizer.end}, and the model reads them at {end}: "
            "the two do not belong together."
        )
    config = TextConfig(
        width=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        layers=settings["num_hidden_layers"],
        context=settings["max_position_embeddings"],
        quick_gelu=settings["hidden_act"] == "quick_gelu",
        tanh_gelu=settings["hidden_act"] == "gelu_pytorch_tanh",
        mlp_ratio=ratio_of(settings["intermediate_size"], settings["hidden_size"]),
        norm_eps=settings["layer_norm_eps"],
        causal=clip,
        pool="end" if clip else "last",
        projection_bias=not clip,
    )
    return TextTower(config, tokenizer, embed_dim, settings["vocab_size"])


def _cleans(folder: Path) -> bool:
    """Return whether the folder's tokenizer is that of the first SigLIP, whose Python code drops punctuation."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and '"SiglipTokenizer"' in file.read_text(encoding="utf-8")


def preprocess_in(source: Source, size: int = 0, default: str = "half") -> Preprocess:
    """Return the preprocessing of a folder of transformers.

    Args:
        size: of the model; 0: the folder's.
        default: the normalization where the folder names none.

    Raises:
        UserError: images are resized neither bilinearly nor bicubically.
    """
    settings = source.json("preprocessor_config.json")
    settings = settings or source.json("processor_config.json").get("image_processor", {})
    mean, std = (
        settings.get(name, part) for name, part in zip(("image_mean", "image_std"), statistics(default), strict=True)
    )
    resized, cut = settings.get("size", size or 224), settings.get("crop_size")
    resized = resized if isinstance(resized, dict) else {"shortest_edge": resized}
    side = int(resized.get("shortest_edge") or resized.get("height", size))
    if cut is None or not settings.get("do_center_crop", True):
        cut = side
    # A model may take another size than the one that its images are cut to: DINOv2 is of 518 pixels, and cuts 224.
    cut = int(cut.get("height", side) if isinstance(cut, dict) else cut)
    kinds = {2: "bilinear", 3: "bicubic"}
    interpolation = kinds.get(settings.get("resample", 3))
    if interpolation is None:
        raise UserError(
            f"images of '{source.given}' are resized in a way (resample = {settings['resample']}) that Altsight lacks."
        )
    return Preprocess(size or cut, normalization_of(mean, std), cut / side, interpolation, "height" in resized)
