"""Single encoders of Hugging Face's transformers: ViT, ViTMAE, DINOv2 with and without registers, BEiT.

Their files name the weights as transformers 4 did; they become the names of the authors' own files, which
`altsight.hub.guess` understands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.hub.fill import filled, timm_point
from altsight.hub.guess import Guess, beit, dinov2, plain_vit
from altsight.hub.huggingface_dual import preprocess_in
from altsight.hub.model import Found, Model
from altsight.hub.source import Source

KINDS = ("vit", "vit_mae", "dinov2", "dinov2_with_registers", "beit")
"""model_type in config.json."""
NAMES = (
    (r"^(vit|dinov2|dinov2_with_registers|beit)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^encoder\.layer\.|^layers\.", "blocks."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense)\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
"""Patterns in transformers' names, applied in this order, and what the authors have instead."""


def recognises(source: Source) -> bool:
    """Return whether `source` is a folder of one of these models."""
    return source.json("config.json").get("model_type") in KINDS


def read(source: Source) -> Model:
    """Return the encoder in the folder, with its preprocessing; decoders, poolers and classifiers are left over.

    Raises:
        UserError: weights are missing, or a setting has no counterpart here.
    """
    settings = source.json("config.json")
    if settings.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"'{source.given}' has the activation '{settings['hidden_act']}', and only gelu can be read.")
    guess = _guess(settings["model_type"], _renamed(source.weights))
    preprocess = preprocess_in(source, guess.config.img_size)
    config = replace(
        guess.config,
        heads=settings["num_attention_heads"],
        norm_eps=settings["layer_norm_eps"],
        normalization=preprocess.normalization,
    )
    encoder, left = filled(config, guess.weights, source.given)
    found = Found(f"{guess.recognised}, of Hugging Face's transformers", left)
    return Model(found, encoder, preprocess, guess.point or timm_point(encoder))


def _guess(kind: str, weights: dict[str, Tensor]) -> Guess:
    if kind == "beit":
        return beit(weights)
    if kind.startswith("dinov2"):
        return dinov2(weights)
    name = "MAE's encoder" if kind == "vit_mae" else "a ViT"
    return Guess(name, plain_vit(weights), weights, "cls")


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the authors' names, with one map for q, k and v."""
    found = {}
    for name, value in weights.items():
        for pattern, own in NAMES:
            name = re.sub(pattern, own, name)
        found[name] = value
    for name in [name for name in found if name.endswith(".attn.q.weight")]:
        block = name.removesuffix("q.weight")
        found[f"{block}qkv.weight"] = torch.cat([found.pop(f"{block}{part}.weight") for part in "qkv"])
        q, k, v = (found.pop(f"{block}{part}.bias", None) for part in "qkv")
        if q is not None and v is not None:
            # BEiT's keys have no bias.
            biases = {"q_bias": q, "v_bias": v} if k is None else {"qkv.bias": torch.cat([q, k, v])}
            found |= {f"{block}{kind}": value for kind, value in biases.items()}
    return found
