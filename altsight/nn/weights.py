"""Weights of an encoder from elsewhere: another run of this toolkit, a file, or timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from altsight.core.config import from_dict, read_json
from altsight.core.errors import UserError
from altsight.data.views import NORMALIZATIONS
from altsight.nn.encoder import Encoder, EncoderConfig

Weights = dict[str, Tensor]


def load_encoder(encoder: Encoder, source: str, part: str = "encoder.") -> None:
    """Fill `encoder` from `source`.

    Args:
        source: the folder of a run (its newest checkpoint, averaged weights where it has them); a .safetensors file,
            or one of torch.save, with the state of an encoder or of timm's model; or "timm": timm's own pre-trained
            weights of the encoder's model, which takes a network or a filled cache.
        part: what the names of the encoder's weights begin with in a run; another for a teacher.

    Raises:
        UserError: there is no such thing, it cannot be read, or it is of an encoder of another shape or input.
    """
    directory = Path(source)
    if source == "timm":
        weights = _of_timm(encoder.config)
    elif directory.is_dir():
        weights = _of_run(directory, part)
    else:
        weights = _of_file(directory)
    _check_shapes(weights, encoder, source)
    if source != "timm" and directory.is_dir():
        _check_input(directory, encoder)
    encoder.load_state_dict(weights)


def _of_run(directory: Path, part: str) -> Weights:
    # A checkpoint is whole once its checksum lies beside it.
    whole = [path for path in sorted(directory.glob("checkpoints/samples_*.pt")) if path.with_suffix(".json").exists()]
    if not whole:
        raise UserError(f"the run in '{directory}' has no checkpoint yet: let it reach its first one.")
    state = _read(whole[-1])
    return _within(state["ema"] or state["method"], part)


def _of_file(path: Path) -> Weights:
    if not path.exists():
        raise UserError(f"there are no weights at '{path}': give the folder of a run, a file of weights, or timm.")
    state = _read(path)
    if any(name.startswith("encoder.") for name in state):
        return _within(state, "encoder.")
    if any(name.startswith("backbone.") for name in state):
        return state
    # timm's own names lack the prefix.
    return {f"backbone.{name}": value for name, value in state.items()}


def _of_timm(config: EncoderConfig) -> Weights:
    size: dict[str, Any] = {"img_size": config.img_size} if config.model.startswith(("vit_", "deit")) else {}
    try:
        model: Any = timm.create_model(config.model, pretrained=True, num_classes=0, **size)
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"timm's weights of '{config.model}' cannot be fetched ({reason}): connect to a network, or give a file of "
            "weights."
        ) from None
    statistics = tuple(tuple(model.pretrained_cfg[name]) for name in ("mean", "std"))
    if statistics != NORMALIZATIONS[config.normalization]:
        fitting = [name for name, value in NORMALIZATIONS.items() if value == statistics]
        raise UserError(
            f"timm's weights of '{config.model}' expect images of mean {statistics[0]} and deviation {statistics[1]}: "
            + (f"set --encoder.normalization {fitting[0]}." if fitting else "Altsight has no such normalization.")
        )
    return {f"backbone.{name}": value for name, value in model.state_dict().items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the readers raise on bytes that are no weights is of every kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the weights in '{path}' cannot be read ({reason}): give another file.") from None
    if not isinstance(state, dict):
        raise UserError(f"'{path}' holds no weights by name: give another file.")
    return state


def _within(state: dict[str, Any], prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _width(weights: Weights) -> int | None:
    """Return the width of a vision transformer, which its last norm has; None if it is none."""
    norms = [weights[name] for name in ("backbone.norm.weight", "backbone.fc_norm.weight") if name in weights]
    return len(norms[0]) if norms else None


def _check_shapes(weights: Weights, encoder: Encoder, source: str) -> None:
    theirs, mine = _width(weights), encoder.width
    if theirs is not None and theirs != mine:
        raise UserError(
            f"the weights in '{source}' are of an encoder {theirs} wide, and this one is {mine} wide: set "
            "--encoder.model and --encoder.width to what they were trained with."
        )
    own = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
    differ = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if differ:
        name = differ[0]
        raise UserError(
            f"the weights in '{source}' do not fit the encoder in {len(differ)} of {len(own)} tensors ('{name}' is "
            f"{found.get(name, 'missing')} there and {own.get(name, 'missing')} here): set --encoder.* to what they "
            "were trained with."
        )


def _check_input(directory: Path, encoder: Encoder) -> None:
    """Refuse an encoder that differs from that of the run in what no shape shows."""
    file = directory / "run.json"
    config, mine = from_dict(read_json(file).get("encoder"), EncoderConfig, str(file)), encoder.config
    with torch.device("meta"):
        theirs = Encoder(config)
    settings = [(name, getattr(config, name), getattr(mine, name)) for name in ("normalization", "quick_gelu")]
    if encoder.is_vit:
        settings.append(("heads", theirs.heads, encoder.heads))
    for name, there, here in settings:
        if there != here:
            raise UserError(
                f"the encoder in '{directory}' was trained with --encoder.{name.replace('_', '-')} {there}, and this "
                f"one has {here}: set the same."
            )
