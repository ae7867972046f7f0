"""CLIP_benchmark runs our models: `python -m altsight.hub.clip_benchmark eval --model_type altsight --pretrained RUN`.

CLIP_benchmark knows kinds of models by a table of loading functions. This adds one that loads whatever `altsight load`
loads, and hands the command line on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.hub.load import load_view

MODEL_TYPE = "altsight"


class Benchmarked(nn.Module):
    """The two towers as CLIP_benchmark calls them: uint8 images and token ids -> unit vectors.

    Raises:
        UserError: the view has no text tower.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        if view.text is None:
            raise UserError(f"'{view.name}' has no text tower, which CLIP_benchmark's tasks need.")
        self.view = view
        self.text = view.text

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors (n, E) of images, uint8 (n, 3, size, size)."""
        return self.view.encode_image(images).to(self.view.device)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return vectors (n, E) of token ids (n, context)."""
        vectors: Tensor = self.text(ids)
        return vectors


def load(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Benchmarked, Any, Any]:
    """Return what CLIP_benchmark's loading functions return: model, transform of a PIL image, tokenizer.

    Args:
        model_name: any; it names the results. pretrained: what `altsight load` takes. cache_dir: is not used.
    """
    view = load_view(pretrained, device=str(device))
    model = Benchmarked(view).eval()

    def transform(image: PIL.Image.Image) -> Tensor:
        pixels = np.asarray(image.convert("RGB"))
        header = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
        return view.preprocess(header + pixels.tobytes())

    return model, transform, model.text.encode


def main(argv: Sequence[str] | None = None) -> None:
    """Run CLIP_benchmark's command line with the model type `altsight`."""
    try:
        from clip_benchmark import cli, models
        from clip_benchmark.metrics import zeroshot_classification
    except ModuleNotFoundError:
        raise UserError("CLIP_benchmark is not installed: `pip install clip-benchmark webdataset`.") from None
    models.TYPE2FUNC[MODEL_TYPE] = load
    # The command line holds this very list as its choices.
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    # Its top-k turns an array of one number to a float, which NumPy no longer does from 2.4 on.
    zeroshot_classification.float = _to_float
    sys.argv = ["clip_benchmark", *(sys.argv[1:] if argv is None else argv)]
    cli.main()


def _to_float(value: Any) -> float:
    return float(value.item() if isinstance(value, np.ndarray) else value)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"altsight: {error}")
