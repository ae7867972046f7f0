"""The towers of a view as ONNX files, for any number of images or texts at a time; checked with onnxruntime."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.hub.hf_tokenizer import fast_tokenizer
from altsight.hub.parity import TEXTS, largest, pictures
from altsight.nn.text import TextEncoder, TextTower

USAGE = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/image.onnx")
images = np.random.rand(2, 3, {size}, {size}).astype("float32")  # RGB in [0, 1]; they are normalised inside
outputs = dict(zip([out.name for out in session.get_outputs()], session.run(None, {{"images": images}})))
print({{name: value.shape for name, value in outputs.items()}})
"""
TEXT_USAGE = """
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = tokenizer(["a dog"], padding="max_length", truncation=True, max_length={context}, return_tensors="np").input_ids
texts = onnxruntime.InferenceSession("{folder}/text.onnx").run(None, {{"ids": ids.astype("int64")}})[0]
print({scale:.6g} * outputs["embeddings"] @ texts.T + {bias:.6g})
"""
IDS_USAGE = """
# Token ids (batch, {context}) as this text tower's own `encode` makes them in Altsight.
texts = onnxruntime.InferenceSession("{folder}/text.onnx").run(None, {{"ids": np.ones((1, {context}), "int64")}})[0]
print({scale:.6g} * outputs["embeddings"] @ texts.T + {bias:.6g})
"""


class ImageSide(nn.Module):
    """Images (B, 3, S, S) in [0, 1] -> features (B, D) and, of a dual encoder, unit vectors (B, E)."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.encoder = view.encoder
        self.owner = view.embed_image.__self__ if view.embed_image is not None else None  # type: ignore[attr-defined]
        self.point = view.feature_point

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoded = self.encoder(self.encoder.normalize(images))
        features = self.encoder.point(encoded, self.point)
        return (features,) if self.owner is None else (features, F.normalize(self.owner.embed_image(encoded), dim=-1))


class TextSide(nn.Module):
    """Token ids (B, T) -> unit vectors (B, E)."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (F.normalize(self.text(ids), dim=-1),)


def write(view: View, folder: Path) -> None:
    """Write image.onnx and, of a dual encoder, text.onnx and a tokenizer that transformers loads.

    Raises:
        UserError: an optional library is missing, or the model has operations that ONNX lacks.
    """
    images = pictures(view, 2).to(view.device)
    names = ("features",) if view.embed_image is None else ("features", "embeddings")
    _export(ImageSide(view), images, folder / "image.onnx", "images", names)
    if view.text is not None:
        ids = view.text.encode(TEXTS[:2]).to(view.device)
        _export(TextSide(view.text), ids, folder / "text.onnx", "ids", ("embeddings",))
        if isinstance(view.text, TextTower):
            _tokenizer(view.text).save_pretrained(folder)


@torch.inference_mode()
def compare(view: View, folder: Path) -> dict[str, float]:
    """Run the files on one and on several inputs; return the largest differences."""
    images = pictures(view, 5)
    ours = [part.cpu() for part in ImageSide(view).eval()(images.to(view.device))]
    names = ("features", "image vectors")[: len(ours)]
    differences = dict.fromkeys(names, 0.0)
    for count in (1, len(images)):
        for name, mine, theirs in zip(names, ours, _run(folder / "image.onnx", images[:count]), strict=True):
            differences[name] = max(differences[name], largest(mine[:count], theirs))
    if view.text is not None:
        texts, ids = view.encode_text(TEXTS), _ids(view.text, folder)
        found = [_run(folder / "text.onnx", ids[:count])[0] for count in (1, len(ids))]
        differences["text vectors"] = max(largest(texts[: len(theirs)], theirs) for theirs in found)
    return differences


def usage(view: View, folder: str) -> str:
    """Return Python code that runs the files in `folder`."""
    code = USAGE.format(folder=folder, size=view.preprocess.size)
    if view.text is None:
        return code
    of_text = TEXT_USAGE if isinstance(view.text, TextTower) else IDS_USAGE
    numbers = {"scale": view.logit_scale, "bias": view.logit_bias, "context": view.text.context}
    return code + of_text.format(folder=folder, **numbers)


def _tokenizer(text: TextTower) -> Any:
    return fast_tokenizer(text.tokenizer, text.context, text.config.pad_with_end)


def _ids(text: TextEncoder, folder: Path) -> Tensor:
    """Return the ids of `TEXTS` as the user of the export makes them."""
    if not isinstance(text, TextTower):
        return text.encode(TEXTS)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    frame = {"padding": "max_length", "truncation": True, "max_length": text.context}
    ids: Tensor = tokenizer(list(TEXTS), **frame, return_tensors="pt").input_ids
    return ids


def _export(module: nn.Module, example: Tensor, path: Path, given: str, names: tuple[str, ...]) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("the export to ONNX needs onnx and onnxscript: `pip install 'altsight[export]'`.") from None
    module = _unfused(module).eval()
    try:
        with warnings.catch_warnings(), _quiet("onnxscript"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (example,),
                str(path),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=[given],
                output_names=list(names),
                dynamic_shapes={given: {0: torch.export.Dim("batch", min=1)}},
            )
    except Exception as error:  # what the exporter raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"PyTorch cannot export this model to ONNX ({reason}): export it to another format.") from None


def _unfused(module: nn.Module) -> nn.Module:
    """Return a copy whose attention is written out: the exporter stumbles over PyTorch's with a bias."""
    copied = copy.deepcopy(module)
    part: Any
    for part in copied.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return copied


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run(path: Path, given: Tensor) -> list[Tensor]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("an ONNX export is checked with onnxruntime: `pip install 'altsight[export]'`.") from None
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: given.numpy()})]
