"""An encoder in one .safetensors file, with its settings in the file's metadata: what `altsight load FILE` reads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from altsight.evals.base import View

SETTINGS = "altsight"
"""Entry of the metadata: JSON with the encoder's config, the preprocessing and the feature point."""


def write_encoder(view: View, path: Path) -> None:
    """Write the encoder of `view` under another name and rename it; a text tower and projections stay behind."""
    settings = {
        "encoder": asdict(view.encoder.config),
        "preprocess": asdict(view.preprocess),
        "feature_point": view.feature_point,
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in view.encoder.state_dict().items()}
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(weights, part, metadata={SETTINGS: json.dumps(settings)})
    part.replace(path)
