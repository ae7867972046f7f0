"""Dual encoders of OpenCLIP and of OpenAI, as the toolkit's own: read from a folder, a file, or through the library.

The settings come from the folder's open_clip_config.json, from the library by the model's name, or off the shapes of
the weights, as OpenCLIP does with OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altsight.core.errors import UserError, did_you_mean
from altsight.data.clean import Clean
from altsight.data.text import Tokenizer
from altsight.data.views import normalization_of, statistics
from altsight.evals.base import Preprocess
from altsight.hub.clip_tokenizer import clip_tokenizer
from altsight.hub.guess import heads_of
from altsight.hub.hf_tokenizer import hf_tokenizer
from altsight.hub.model import Found, Model
from altsight.hub.names import adopt, need_all, ratio_of
from altsight.hub.openclip_resnet import settings_of as resnet_settings
from altsight.hub.openclip_towers import image_side, text_side, transposed
from altsight.hub.source import Source

CONFIG = "open_clip_config.json"
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives keep among the weights; they are left over."""
SCALES = ("logit_scale", "logit_bias")


def recognises(source: Source) -> bool:
    """Return whether `source` is a dual encoder in OpenCLIP's or OpenAI's format."""
    if source.scheme:
        return source.scheme == "open_clip"
    if source.json(CONFIG):
        return True
    if source.json("config.json"):
        return False
    names = _plain(source.weights)
    words = "token_embedding.weight"
    return "logit_scale" in names and (words in names or f"text.{words}" in names) and _has_image_side(names)


def read(source: Source) -> Model:
    """Return the dual encoder at `source`; fp16 weights become fp32.

    Raises:
        UserError: it cannot be fetched, a setting has no counterpart here, or weights are missing.
    """
    if source.scheme == "open_clip" and source.path is None:
        return _fetched(source)
    weights = _plain(source.weights)
    if source.scheme == "open_clip":
        settings, words = _known(source.model), f"OpenCLIP's {source.model}"
        return build(settings, {}, weights, words, source.given)
    if config := source.json(CONFIG):
        if not config.get("model_cfg"):
            raise UserError(f"'{source.path}/{CONFIG}' has no model_cfg: give the folder as OpenCLIP writes it.")
        words, folder = "a dual encoder in OpenCLIP's folder format", str(source.path)
        return build(config["model_cfg"], config.get("preprocess_cfg") or {}, weights, words, source.given, folder)
    openai = any(mark in weights for mark in OPENAI_MARKS)
    who = "OpenAI's CLIP" if openai else "a dual encoder of OpenCLIP with the exact GELU"
    return build(_off_shapes(weights, openai), {}, weights, f"{who}, sizes read off its weights", source.given)


def build(
    settings: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    recognised: str,
    given: str,
    folder: str = "",
) -> Model:
    """Return the Model of OpenCLIP's `model_cfg` and `preprocess_cfg` with these weights.

    Args:
        folder: where the tokenizer's files are, if the model has its own; "": on the hub.

    Raises:
        UserError: a setting has no counterpart here, or weights are missing or of another size.
    """
    if settings.get("multimodal_cfg"):
        raise UserError(f"'{given}' is OpenCLIP's CoCa, which Altsight does not read: use a dual encoder without it.")
    embed_dim, quick = int(settings["embed_dim"]), bool(settings.get("quick_gelu"))
    mean, std = statistics("clip")
    normalization = normalization_of(preprocess.get("mean", mean), preprocess.get("std", std))
    image = image_side(settings["vision_cfg"], embed_dim, quick, normalization, weights.keys())
    tokenizer = _tokenizer(settings["text_cfg"], folder)
    custom = "text.token_embedding.weight" in weights
    tower, names = text_side(settings["text_cfg"], embed_dim, quick, tokenizer, custom)
    names = image.names | names
    model = Model(
        Found(recognised),
        image.encoder,
        _preprocess(preprocess, image.encoder.config.img_size, normalization),
        image.feature_point,
        text=tower,
        image_projection=image.projection,
        joint_point=image.joint_point,
        logit_scale=float(weights["logit_scale"].exp()) if "logit_scale" in weights else 100.0,
        logit_bias=float(weights.get("logit_bias", 0.0)),
    )
    _no_bias_of_patches(model)
    left, missing = adopt(model, weights, names, transposed(names))
    need_all(missing, names, given)
    model.found = Found(recognised, tuple(name for name in left if name not in SCALES))
    return model


def _fetched(source: Source) -> Model:
    """Return a model by name and tag through the library, which downloads it or finds it in its cache."""
    name, _, tag = source.model.partition("/")
    open_clip = _library()
    settings = _known(name)
    try:
        theirs = open_clip.create_model(name, pretrained=tag or None, require_pretrained=True)
    except Exception as error:  # a hub without a network, or an unknown tag: errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"OpenCLIP cannot fetch '{source.model}' ({reason}): write open_clip:MODEL/PRETRAINED with a tag of the "
            "model, or open_clip:MODEL=FILE."
        ) from None
    # A tag decides on the activation too.
    quick = any(type(module).__name__ == "QuickGELU" for module in theirs.modules())
    preprocess = open_clip.get_model_preprocess_cfg(theirs)
    return build(
        settings | {"quick_gelu": quick},
        preprocess,
        theirs.state_dict(),
        f"OpenCLIP's {name} with the weights {tag}",
        source.given,
    )


def _library() -> Any:
    try:
        import open_clip
    except ImportError:
        raise UserError("OpenCLIP's models need the library open_clip: `pip install 'altsight[openclip]'`.") from None
    return open_clip


def _known(name: str) -> dict[str, Any]:
    open_clip = _library()
    settings: dict[str, Any] | None = open_clip.get_model_config(name)
    if settings is None:
        raise UserError(f"OpenCLIP has no model '{name}'.{did_you_mean(name, open_clip.list_models())}")
    return settings


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefix that training on several devices leaves."""
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _has_image_side(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("visual.conv1.", "visual.trunk.")) for name in weights)


def _off_shapes(weights: Mapping[str, Tensor], quick_gelu: bool) -> dict[str, Any]:
    """Return OpenCLIP's settings of a model with its own towers, as far as they show in its weights."""
    text = "text." if "text.token_embedding.weight" in weights else ""
    known = "visual.proj" in weights or "visual.attnpool.c_proj.weight" in weights
    if not known or f"{text}text_projection" not in weights:
        raise UserError(
            "the settings of this OpenCLIP model do not show in its weights (its image side is not OpenCLIP's own "
            "vision transformer): name the model, open_clip:MODEL=FILE."
        )
    vision = _vit_off_shapes(weights) if "visual.proj" in weights else resnet_settings(weights)
    context, text_width = weights[f"{text}positional_embedding"].shape
    language = {
        "context_length": context,
        "vocab_size": len(weights[f"{text}token_embedding.weight"]),
        "width": text_width,
        "heads": text_width // 64,
        "layers": _depth(weights, f"{text}transformer.resblocks."),
        "mlp_ratio": ratio_of(len(weights[f"{text}transformer.resblocks.0.mlp.c_fc.weight"]), text_width),
    }
    embed_dim = weights[f"{text}text_projection"].shape[1]
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": language, "quick_gelu": quick_gelu}


def _vit_off_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "layers": _depth(weights, "visual.transformer.resblocks."),
        "head_width": width // heads_of(width),
        "mlp_ratio": ratio_of(len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]), width),
        "no_ln_pre": "visual.ln_pre.weight" not in weights,
        "ls_init_value": 1.0 if "visual.transformer.resblocks.0.ls_1.gamma" in weights else None,
    }


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _tokenizer(settings: Mapping[str, Any], folder: str) -> Tokenizer:
    options = dict(settings.get("tokenizer_kwargs") or {})
    name = settings.get("hf_tokenizer_name")
    clean: Clean = options.pop("clean", "whitespace" if name else "lower")
    unknown = [key for key, value in options.items() if value]
    if unknown or settings.get("tokenizer_mode"):
        raise UserError(f"OpenCLIP's tokenizer option {unknown or ['tokenizer_mode']} has no counterpart in Altsight.")
    return hf_tokenizer(folder or name, clean) if name else clip_tokenizer(clean)


def _preprocess(settings: Mapping[str, Any], size: int, normalization: str) -> Preprocess:
    mode = settings.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise UserError(
            f"OpenCLIP's way '{mode}' of resizing images has no counterpart in Altsight: use another model."
        )
    interpolation = settings.get("interpolation", "bicubic")
    return Preprocess(
        size, normalization, 1.0, "bilinear" if interpolation == "bilinear" else "bicubic", mode == "squash"
    )


def _no_bias_of_patches(model: Model) -> None:
    """Set the bias that timm's patch embedding has, and OpenCLIP's has not, to nothing."""
    projection = getattr(getattr(model.encoder.backbone, "patch_embed", None), "proj", None)
    if projection is not None and getattr(projection, "bias", None) is not None:
        projection.bias.data.zero_()
