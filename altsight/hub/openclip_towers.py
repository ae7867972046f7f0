"""OpenCLIP's towers as an encoder and a text tower, with the names of their weights; from OpenCLIP's own settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import Mlp
from torch import nn

from altsight.core.errors import UserError
from altsight.data.text import Tokenizer
from altsight.hub.fill import check_served
from altsight.hub.names import Names, block_names, linear, ratio_of
from altsight.hub.openclip_resnet import resnet
from altsight.nn.encoder import Encoder, EncoderConfig, FeaturePoint
from altsight.nn.text import TextConfig, TextTower

BLOCK = {
    "norm1.": "ln_1.",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""Parts of a transformer block: own name -> OpenCLIP's."""
SCALES = {"ls1.gamma": "ls_1.gamma", "ls2.gamma": "ls_2.gamma"}
TRANSPOSED = ("image_projection.weight", "text.text_projection.weight")
"""Matrices that OpenCLIP holds the other way round, where they are parameters of their own."""
PLAIN = "vit_base_patch16_224"
"""Any plain vision transformer of timm: every size is set."""

_IMAGE_KNOWN = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre"),
    *("final_ln_after_pool", "pool_type", "norm_kwargs"),
}
_TRUNK_KNOWN = {"timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias", "image_size"}
_IMAGE_IGNORED = {
    *("patch_dropout", "pos_embed_type", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path"),
}
"""What matters in training only, or shows in the weights."""
_TEXT_KNOWN = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask", "pool_type", "eos_id"),
    *("proj_bias", "act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs"),
}
_TEXT_IGNORED = {"output_tokens", "pad_id", "hf_model_pretrained"}


@dataclass(frozen=True)
class ImageSide:
    """The image tower: its encoder, where the joint vectors are read, the map to them, and OpenCLIP's names."""

    encoder: Encoder
    feature_point: FeaturePoint
    joint_point: FeaturePoint
    projection: nn.Module | None
    names: Names


def image_side(
    settings: Mapping[str, Any], embed_dim: int, quick_gelu: bool, normalization: str, given: Collection[str]
) -> ImageSide:
    """Return the image tower of OpenCLIP's `vision_cfg`, without weights; `given`: the names of those that there are.

    Raises:
        UserError: it has a part that an encoder has not.
    """
    if settings.get("timm_model_name"):
        return _trunk(settings, embed_dim, normalization)
    if isinstance(settings.get("layers"), list | tuple):
        encoder, projection, names = resnet(settings, embed_dim, normalization, given)
        return ImageSide(encoder, "pooled", "pooled", projection, names)
    _check(settings, _IMAGE_KNOWN, _IMAGE_IGNORED, "vision_cfg")
    width, pool = int(settings.get("width", 768)), settings.get("pool_type", "tok")
    behind = pool == "avg" and bool(settings.get("final_ln_after_pool"))
    if pool not in ("tok", "avg") or (pool == "tok" and settings.get("final_ln_after_pool")):
        raise UserError(f"OpenCLIP's pooling '{pool}' of images has no counterpart in Altsight: use another model.")
    config = EncoderConfig(
        model=PLAIN,
        img_size=_square(settings.get("image_size", 224)),
        patch_size=_square(settings.get("patch_size", 16)),
        width=width,
        depth=int(settings.get("layers", 12)),
        heads=width // int(settings.get("head_width", 64)),
        mlp_ratio=_ratio(settings, width),
        layer_scale=settings.get("ls_init_value"),
        positions="learned",
        pre_norm=not settings.get("no_ln_pre", False),
        quick_gelu=quick_gelu,
        global_pool="avg" if behind else None,
        norm_eps=float((settings.get("norm_kwargs") or {}).get("eps", 1e-5)),
        normalization=normalization,
    )
    point: FeaturePoint = "pooled" if behind else "cls" if pool == "tok" else "mean"
    encoder = Encoder(config)
    names = vit_names(encoder, last_norm="fc_norm" if behind else "norm")
    return ImageSide(encoder, point, point, nn.Linear(width, embed_dim, bias=False), names)


def vit_names(encoder: Encoder, last_norm: str = "norm") -> Names:
    """Return the names of OpenCLIP's own vision transformer, its projection included."""
    own, other = "encoder.backbone", "visual"
    backbone = encoder.backbone
    scaled = hasattr(backbone.blocks[0].ls1, "gamma")
    names = {
        f"{own}.cls_token": f"{other}.class_embedding",
        f"{own}.pos_embed": f"{other}.positional_embedding",
        f"{own}.patch_embed.proj.weight": f"{other}.conv1.weight",
        "image_projection.weight": f"{other}.proj",
    }
    names |= linear(f"{own}.{last_norm}", f"{other}.ln_post")
    if isinstance(backbone.norm_pre, nn.LayerNorm):
        names |= linear(f"{own}.norm_pre", f"{other}.ln_pre")
    parts = BLOCK | SCALES if scaled else BLOCK
    return names | block_names(f"{own}.blocks", f"{other}.transformer.resblocks", len(backbone.blocks), parts)


def trunk_names(encoder: Encoder) -> Names:
    """Return the names of an image tower of timm within OpenCLIP, without what follows it."""
    return {f"encoder.backbone.{name}": f"visual.trunk.{name}" for name in encoder.backbone.state_dict()}


def _trunk(settings: Mapping[str, Any], embed_dim: int, normalization: str) -> ImageSide:
    # The name overrides all that describes OpenCLIP's own image tower.
    _check(settings, _TRUNK_KNOWN, _IMAGE_KNOWN | _IMAGE_IGNORED, "vision_cfg")
    model, pool = settings["timm_model_name"], settings.get("timm_pool", "avg")
    head = settings.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn") or not head:
        raise UserError(f"OpenCLIP's pooling '{pool}' with the head '{head}' has no counterpart in Altsight.")
    size = _square(settings.get("image_size", 224))
    config = EncoderConfig(model=model, img_size=size, positions="learned", normalization=normalization)
    # Without a head OpenCLIP builds timm's model with this pooling; with one it changes the pooling of the built model,
    # whose last norm then stays where it was.
    if head == "none" and pool in ("token", "avg", "map"):
        config = replace(config, global_pool=pool)
    encoder = Encoder(config)
    check_served(encoder)
    changed = head != "none" and pool and pool != getattr(encoder.backbone, "global_pool", pool)
    point: FeaturePoint = {"token": "cls", "avg": "mean"}.get(pool, "pooled") if changed else "pooled"  # type: ignore[assignment]
    names = trunk_names(encoder)
    projection: nn.Module | None = None
    if head == "linear":
        bias = bool(settings.get("timm_proj_bias"))
        projection = nn.Linear(encoder.width, embed_dim, bias=bias)
        names |= linear("image_projection", "visual.head.proj", bias)
    elif head == "mlp":
        bias = bool(settings.get("timm_proj_bias"))
        projection = Mlp(encoder.width, 2 * embed_dim, embed_dim, bias=(True, bias))
        names |= linear("image_projection.fc1", "visual.head.mlp.fc1")
        names |= linear("image_projection.fc2", "visual.head.mlp.fc2", bias)
    return ImageSide(encoder, point, point, projection, names)


def text_side(
    settings: Mapping[str, Any], embed_dim: int, quick_gelu: bool, tokenizer: Tokenizer, custom: bool
) -> tuple[TextTower, Names]:
    """Return the text tower of OpenCLIP's `text_cfg`, without weights, and the names of its weights.

    Args:
        custom: the weights are named "text.transformer...", not "transformer...".

    Raises:
        UserError: it has a part that a text tower has not, or its end token is not the one that it pools.
    """
    if settings.get("hf_model_name"):
        raise UserError(
            f"the text tower of this OpenCLIP model is '{settings['hf_model_name']}' of transformers, which Altsight "
            "does not read from OpenCLIP's weights: use a model with OpenCLIP's own text tower."
        )
    _check(settings, _TEXT_KNOWN, _TEXT_IGNORED, "text_cfg")
    width = int(settings.get("width", 512))
    pool = settings.get("pool_type", "argmax")
    vocabulary = int(settings.get("vocab_size", 49408))
    _check_end(pool, settings, tokenizer, vocabulary)
    config = TextConfig(
        width=width,
        heads=int(settings.get("heads", 8)),
        layers=int(settings.get("layers", 12)),
        context=int(settings.get("context_length", 77)),
        quick_gelu=quick_gelu,
        tanh_gelu=(settings.get("act_kwargs") or {}).get("approximate") == "tanh",
        mlp_ratio=_ratio(settings, width),
        norm_eps=float((settings.get("norm_kwargs") or {}).get("eps", 1e-5)),
        causal=not settings.get("no_causal_mask", False),
        pool={"first": "first", "last": "last"}.get(pool, "end"),  # type: ignore[arg-type]
        projection_bias=bool(settings.get("proj_bias")),
    )
    tower = TextTower(config, tokenizer, embed_dim, vocabulary)
    return tower, text_names(tower, "text." if custom else "")


def text_names(tower: TextTower, prefix: str) -> Names:
    """Return the names of OpenCLIP's text tower; `prefix` is "text." in its models of two towers."""
    names = {
        "text.token_embedding.weight": f"{prefix}token_embedding.weight",
        "text.positional_embedding": f"{prefix}positional_embedding",
    }
    names |= linear("text.ln_final", f"{prefix}ln_final")
    names |= block_names("text.blocks", f"{prefix}transformer.resblocks", len(tower.blocks), BLOCK)
    if tower.text_projection.bias is not None:
        return names | linear("text.text_projection", f"{prefix}text_projection")
    return names | {"text.text_projection.weight": f"{prefix}text_projection"}


def transposed(names: Names) -> tuple[str, ...]:
    """Return those of `names` that OpenCLIP holds the other way round: maps that are parameters of their own."""
    return tuple(own for own in TRANSPOSED if names.get(own, "").endswith(("proj", "projection")))


def _check_end(pool: str, settings: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: int) -> None:
    wanted = {"argmax": vocabulary - 1, "eos": settings.get("eos_id", 2)}.get(pool, tokenizer.end)
    if tokenizer.end != wanted:
        raise UserError(
            f"this OpenCLIP model reads texts at the token {wanted}, and its tokenizer ends them with {tokenizer.end}: "
            "the two do not belong together."
        )


def _check(settings: Mapping[str, Any], known: set[str], ignored: set[str], where: str) -> None:
    for name, value in settings.items():
        if name not in known | ignored and value not in (None, False, "", [], {}):
            raise UserError(f"OpenCLIP's setting {where}.{name} = {value!r} has no counterpart in Altsight.")


def _square(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"images and patches must be square, not {' x '.join(map(str, size))}: use another model.")
    return int(sides.pop())


def _ratio(settings: Mapping[str, Any], width: int) -> float:
    return ratio_of(int(width * float(settings.get("mlp_ratio", 4.0))), width)
