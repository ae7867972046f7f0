"""Dual encoders as folders that transformers loads: `AutoModel.from_pretrained(FOLDER)`, `AutoProcessor` likewise.

CLIP and SigLIP take the form of the library's classes of that name. Any other image tower of timm is put beside a text
tower of CLIP's or SigLIP's in the library's pair of any two models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.views import statistics
from altsight.evals.base import View
from altsight.hub.dual import Foreign, as_model, differences, need_plain_map, need_tower
from altsight.hub.hf_tokenizer import fast_tokenizer, swapped
from altsight.hub.huggingface_forms import OTHERS, clip, form_of, siglip, text_kind
from altsight.hub.huggingface_pair import pair
from altsight.hub.model import Model

USAGE = """import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")
texts = ["an orange square", "a photo of a dog"]
image = Image.new("RGB", (320, 240), "orange")
inputs = processor(text=texts, images=image, padding="max_length", truncation=True, return_tensors="pt")
with torch.inference_mode():
    outputs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
print(outputs.logits_per_image)
"""
AMBIGUOUS_END = 2
"""Where transformers' CLIP finds this id of the end token in its settings, it looks for the highest id instead."""


def write(view: View, folder: Path) -> None:
    """Write the dual encoder of `view` to `folder`, which exists.

    Raises:
        UserError: transformers has no such model; the message says what it lacks. Nothing is written then.
    """
    from transformers.utils import logging

    model = as_model(view)
    text = need_tower(model, "transformers")
    need_plain_map(model, "transformers")
    form = form_of(model, text)
    if not text.config.causal and text.tokenizer.rules.special == "words":
        raise UserError(
            "transformers cannot pad with a letter's token, as OpenCLIP does, and this text tower sees the padding: "
            f"{OTHERS}."
        )
    theirs = {"clip": clip, "siglip": siglip, "pair": pair}[form](model, text)
    theirs.logit_scale.data.fill_(math.log(model.logit_scale))
    tokenizer = text.tokenizer
    if text_kind(text) == "clip" and tokenizer.end == AMBIGUOUS_END:
        last = tokenizer.vocab_size - 1
        tokenizer = swapped(tokenizer, AMBIGUOUS_END, last)
        _swap_words(theirs, AMBIGUOUS_END, last)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.eval().save_pretrained(folder)
    fast = fast_tokenizer(tokenizer, text.context, text.config.pad_with_end)
    _processor(form, _image_processor(model), fast).save_pretrained(folder)


def compare(view: View, folder: Path) -> dict[str, float]:
    """Load the folder with transformers; return the largest differences of what it computes."""
    return differences(view, load_back(folder))


def usage(view: View, folder: str) -> str:
    """Return Python code that compares an image with texts by the export in `folder`."""
    return USAGE.format(folder=folder)


def load_back(folder: Path) -> Foreign:
    """Return what transformers makes of the folder that `write` wrote."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def image(images: Tensor) -> Tensor:
        return _vectors(model.get_image_features(pixel_values=images))

    @torch.inference_mode()
    def text(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return _vectors(model.get_text_features(input_ids=inputs.input_ids))

    bias = model.logit_bias.item() if hasattr(model, "logit_bias") else 0.0
    return Foreign(image, text, model.logit_scale.exp().item(), bias)


def _vectors(output: Any) -> Tensor:
    """Return the vectors; before its fifth version the library returned nothing else."""
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors


@torch.no_grad()
def _swap_words(theirs: Any, first: int, second: int) -> None:
    """Change two rows of the table of tokens for each other, and name the end token by its new number."""
    table = theirs.text_model.embeddings.token_embedding.weight
    table[[first, second]] = table[[second, first]]
    theirs.config.text_config.eos_token_id = second


def _image_processor(model: Model) -> Any:
    from transformers import CLIPImageProcessor

    preprocess = model.preprocess
    mean, std = statistics(preprocess.normalization)
    side = round(preprocess.size / preprocess.crop_ratio)
    size = {"height": side, "width": side} if preprocess.squash else {"shortest_edge": side}
    return CLIPImageProcessor(
        size=size,
        crop_size={"height": preprocess.size, "width": preprocess.size},
        resample=2 if preprocess.interpolation == "bilinear" else 3,
        image_mean=list(mean),
        image_std=list(std),
    )


def _processor(form: str, image_processor: Any, tokenizer: Any) -> Any:
    from transformers import CLIPProcessor, SiglipProcessor, VisionTextDualEncoderProcessor

    kinds: dict[str, Any] = {"clip": CLIPProcessor, "siglip": SiglipProcessor, "pair": VisionTextDualEncoderProcessor}
    return kinds[form](image_processor=image_processor, tokenizer=tokenizer)
