"""Any weights as a `View`: the folder of a run, or what another library wrote."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.evals.load import load_view as load_run_view
from altsight.hub.huggingface_dual import fetched
from altsight.hub.model import Found, Model
from altsight.hub.source import Source, parse
from altsight.nn.encoder import Encoder
from altsight.nn.resample import resized
from altsight.train.run import pick_device
from altsight.transfer.base import with_view

READERS = ("own", "lcl", "openclip", "huggingface_dual", "huggingface_pair", "huggingface", "timm", "checkpoints")
"""Modules of this package, asked in this order. Each has `recognises(source) -> bool` and `read(source) -> Model`."""


def load_view(source: str, device: str = "auto", img_size: int = 0) -> View:
    """Return the View of the weights at `source`, on the GPU where there is one.

    Args:
        source: the folder of a run; a file or folder that timm, OpenCLIP, Hugging Face or the authors of a method
            wrote; "timm:NAME" or "timm:NAME=FILE", "open_clip:MODEL/PRETRAINED" or "hf:ORG/NAME".
        img_size: side of the images in pixels; position tables are resampled. 0: that of the weights.

    Raises:
        UserError: there are no weights, none that are known, their settings are wrong, or they cannot take that size.
    """
    return describe(source, img_size, device)[0]


def describe(source: str, img_size: int = 0, device: str = "auto") -> tuple[View, Found]:
    """Return the View of the weights at `source`, and how they were understood; see `load_view`."""
    if is_run(source):
        view = load_run_view(Path(source), device=device)
        sized = with_view(view, _sized(view.encoder, img_size)) if img_size else view
        return sized, Found(f"a run of Altsight, {view.name}")
    model = load_model(source, img_size)
    return model.to(pick_device(device)).view(source), model.found


def load_model(source: str, img_size: int = 0) -> Model:
    """Return the Model of weights that are not a run's; see `load_view`."""
    found = parse(source)
    if found.scheme == "hf":
        found = fetched(found)
    for name in READERS:
        reader: Any = import_module(f"altsight.hub.{name}")
        if reader.recognises(found):
            model = _read(reader, found)
            return at_size(model, img_size) if img_size else model
    raise UserError(
        f"the folder '{source}' is of no kind that is known (its config.json says "
        f"'{found.json('config.json').get('model_type', 'nothing')}'): docs/weights.md lists the kinds."
    )


def at_size(model: Model, img_size: int) -> Model:
    """Return `model` for images of `img_size` pixels; its other weights are untouched."""
    model.encoder = _sized(model.encoder, img_size)
    model.preprocess = replace(model.preprocess, size=img_size)
    return model


def _read(reader: Any, found: Source) -> Model:
    try:
        model: Model = reader.read(found)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, AssertionError) as error:
        # Settings and weights that a stranger wrote may lack anything, and have values of any kind.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"the settings or weights in '{found.given}' are not as their kind has them ({reason}): give them as the "
            "library wrote them."
        ) from error
    return model


def _sized(encoder: Encoder, img_size: int) -> Encoder:
    patch = encoder.patch_size if encoder.is_vit and img_size != encoder.config.img_size else 1
    if img_size < 1:
        raise UserError(f"--img-size {img_size} is no size: give the side of the images in pixels.")
    if img_size % patch:
        lower = max(img_size // patch, 1) * patch
        raise UserError(
            f"--img-size {img_size} is no whole number of patches of {patch} pixels: use {lower} or {lower + patch}."
        )
    return resized(encoder, img_size=img_size)


def is_run(source: str) -> bool:
    """Return whether `source` is the folder of a run of this toolkit."""
    return (Path(source) / "run.json").is_file()
