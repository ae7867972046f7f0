"""Models of timm as an encoder: its own pre-trained weights, a file of them, or a folder that it saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

import timm
import torch
from torch import Tensor

from altsight.core.errors import UserError, did_you_mean
from altsight.data.views import normalization_of
from altsight.evals.base import Preprocess
from altsight.hub.fill import filled, timm_point
from altsight.hub.model import Found, Model
from altsight.hub.source import Source
from altsight.nn.backbone import create_backbone
from altsight.nn.encoder import EncoderConfig, FeaturePoint

ARGUMENTS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "reg_tokens": "registers",
    "init_values": "layer_scale",
    "global_pool": "global_pool",
    "pre_norm": "pre_norm",
}
"""What a folder of timm calls the settings of an encoder, and their names in `EncoderConfig`."""

POINT = "feature_point"
"""Entry of a folder's config.json that timm passes over: where Altsight read the features before it wrote them."""


WRAPS = ("module.", "_orig_mod.", "model.")
"""What training on several devices, compiling and Lightning put before the name of every weight."""


def recognises(source: Source) -> bool:
    """Return whether `source` names a model of timm, or is a folder that timm saved."""
    return source.scheme == "timm" or "architecture" in source.json("config.json")


def read(source: Source) -> Model:
    """Return the model of `source`, with timm's preprocessing, and its classifier left aside.

    Raises:
        UserError: timm does not know the model, cannot fetch it, or the weights are not of it.
    """
    if source.scheme == "timm" and source.path is None:
        return _fetched(source)
    if not source.scheme:
        return _of_folder(source)
    config, cfg = described(source.model), pretrained_cfg(source.model)
    recognised = f"a file of weights of timm's {source.model}"
    return _model(recognised, config, cfg, converted(_bare(source.weights), config), source.given)


def _bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((prefix for prefix in WRAPS if all(name.startswith(prefix) for name in weights)), "")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _of_folder(source: Source) -> Model:
    folder = source.json("config.json")
    cfg = pretrained_cfg(folder["architecture"]) | folder.get("pretrained_cfg", {})
    config = _built(folder, cfg, source.given)
    recognised = f"a folder that timm loads, {folder['architecture']}"
    return _model(recognised, config, cfg, converted(source.weights, config), source.given, folder.get(POINT))


def _fetched(source: Source) -> Model:
    config = described(source.model)
    try:
        model: Any = timm.create_model(source.model, pretrained=True)
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"timm's weights of '{source.model}' cannot be fetched ({reason}): connect to a network, or give a file as "
            f"timm:{source.model}=FILE."
        ) from None
    recognised = f"timm's pre-trained {source.model}"
    return _model(recognised, config, model.pretrained_cfg, model.state_dict(), source.given)


def _model(
    recognised: str,
    config: EncoderConfig,
    cfg: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    given: str,
    point: FeaturePoint | None = None,
) -> Model:
    config = replace(config, normalization=normalization_of(cfg["mean"], cfg["std"]))
    encoder, left_over = filled(config, weights, given)
    return Model(Found(recognised, left_over), encoder, preprocess_of(cfg, config), point or timm_point(encoder))


def preprocess_of(cfg: Mapping[str, Any], config: EncoderConfig) -> Preprocess:
    """Return the preprocessing that timm's description of pre-trained weights asks for, at the encoder's size.

    Raises:
        UserError: images are to be padded, which only a few models of timm want.
    """
    if cfg.get("crop_mode") == "border":
        raise UserError(
            f"timm's '{config.model}' wants images padded to a square, which is not supported: use another."
        )
    return Preprocess(
        config.img_size,
        config.normalization,
        crop_ratio=cfg.get("crop_pct") or 0.875,
        interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",
        squash=cfg.get("crop_mode") == "squash",
    )


def described(name: str) -> EncoderConfig:
    """Return the config of timm's model `name` at its own size."""
    cfg = pretrained_cfg(name)
    return EncoderConfig(name.partition(".")[0], img_size=cfg["input_size"][-1], positions="learned")


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Return what timm says of the pre-trained weights `name`: input size, statistics, interpolation, crop ...

    Raises:
        UserError: there is no such model, or no such weights of it.
    """
    model = name.partition(".")[0]
    if not timm.is_model(model):
        raise UserError(f"timm has no model '{model}'.{did_you_mean(model, timm.list_models())}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        raise UserError(
            f"timm has no weights '{name}': it has {', '.join(timm.list_pretrained(f'{model}.*')) or 'none'}."
        ) from None
    assert cfg is not None, "timm has a description of every model"
    return asdict(cfg)


def _built(folder: Mapping[str, Any], cfg: Mapping[str, Any], given: str) -> EncoderConfig:
    """Return the config of a folder's model."""
    arguments = {name: value for name, value in folder.get("model_args", {}).items() if value is not None}
    settings = {"img_size": cfg["input_size"][-1], "positions": "learned"}
    settings |= {ARGUMENTS[name]: _side(arguments.pop(name)) for name in list(arguments) if name in ARGUMENTS}
    if arguments.get("fc_norm") is False and settings.get("global_pool") == "avg":
        # The last norm acts on every token, as in models that read the class token, and the mean is taken of those.
        settings["global_pool"] = "token"
    if arguments.get("act_layer") == "quick_gelu":
        settings["quick_gelu"] = True
    if arguments.get("pos_embed") == "none":
        settings["positions"] = "none"
    harmless = {"num_classes": None, "in_chans": 3, "dynamic_img_size": None, "act_layer": "quick_gelu"}
    harmless |= {"pos_embed": "none", "fc_norm": False}
    unknown = [name for name, value in arguments.items() if name not in harmless or harmless[name] not in (None, value)]
    if unknown:
        raise UserError(
            f"'{given}' builds timm's model with {', '.join(sorted(unknown))}, for which Altsight's encoder has no "
            "setting: use a folder without."
        )
    return EncoderConfig(folder["architecture"].partition(".")[0], **settings)


def _side(value: Any) -> Any:
    """Return the side of a square where timm has (height, width)."""
    return value[0] if isinstance(value, list) and value[0] == value[-1] else value


def converted(weights: dict[str, Tensor], config: EncoderConfig) -> Mapping[str, Tensor]:
    """Return `weights` as the model's own state has them; timm knows the names that the authors' files have."""
    with torch.device("meta"):
        backbone = create_backbone(config)
    convert = getattr(import_module(type(backbone).__module__), "checkpoint_filter_fn", None)
    found: Mapping[str, Tensor] = weights if convert is None else convert(weights, backbone)
    return found
