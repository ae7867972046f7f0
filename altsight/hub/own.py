"""An encoder in one .safetensors file, with its settings in the file's metadata: Altsight's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from altsight.core.config import from_dict
from altsight.core.errors import UserError
from altsight.evals.base import Preprocess, View
from altsight.evals.encoder_file import SETTINGS, write_encoder
from altsight.hub.model import Found, Model
from altsight.hub.parity import largest, pictures
from altsight.hub.source import Source
from altsight.nn.encoder import Encoder, EncoderConfig

FILE = "encoder.safetensors"
USAGE = """import altsight
from PIL import Image

view = altsight.load("{folder}")
print(view.features([Image.new("RGB", (320, 240), "orange")]).shape)
"""


def recognises(source: Source) -> bool:
    """Return whether `source` is such a file, or a folder with one."""
    return not source.scheme and bool(_settings(source))


def read(source: Source) -> Model:
    """Return the encoder.

    Raises:
        UserError: the file's settings and weights do not belong together.
    """
    settings = _settings(source)
    encoder = Encoder(from_dict(settings["encoder"], EncoderConfig, source.given))
    try:
        encoder.load_state_dict(source.weights)
    except RuntimeError:
        raise UserError(f"the weights in '{source.given}' are not of the encoder that its settings name.") from None
    preprocess = from_dict(settings["preprocess"], Preprocess, source.given)
    return Model(Found("an encoder that Altsight exported"), encoder.eval(), preprocess, settings["feature_point"])


def write(view: View, folder: Path) -> None:
    """Write the encoder of `view`; a text tower and projections stay behind."""
    write_encoder(view, folder / FILE)


@torch.inference_mode()
def compare(view: View, folder: Path) -> dict[str, float]:
    """Load the file; return the largest difference of its features."""
    encoder = read(Source(str(folder), "", "", folder)).encoder
    images = view.encoder.normalize(pictures(view))
    ours = view.encoder.eval()(images.to(view.device))
    ours_features = view.encoder.point(ours, view.feature_point).cpu()
    return {"features": largest(ours_features, encoder.point(encoder(images), view.feature_point))}


def usage(view: View, folder: str) -> str:
    """Return Python code that reads features from the export in `folder`."""
    return USAGE.format(folder=folder)


def _settings(source: Source) -> dict[str, Any]:
    if source.path is None:
        return {}
    path = source.path
    if path.is_dir():
        path = path / FILE
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
    except (SafetensorError, ValueError):
        return {}  # whoever reads the weights says what is wrong
    return found
