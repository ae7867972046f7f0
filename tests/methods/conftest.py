"""A tiny corpus, encoder and batch for the methods' own tests; no files."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch, Document, Image, Text
from altsight.data.text import train_tokenizer
from altsight.data.views import random_keep
from altsight.methods.base import Corpus
from altsight.nn.encoder import Encoder, EncoderConfig

TEXTS = ("a red house by the sea", "two dogs", "a green sofa and a red lamp")


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus(train_tokenizer(iter(TEXTS * 3), 300), ("house", "dog", "sofa", "lamp"))


@pytest.fixture
def encoder() -> Encoder:
    """4 x 4 patches of 8 pixels, a CLS token and two registers."""
    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2, registers=2)
    return Encoder(config)


@pytest.fixture
def batch(corpus: Corpus) -> Batch:
    """Three samples: image, keep (4 of 16 patches), text (context 16), label."""
    tensors = {
        "image": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        "keep": torch.stack([random_keep(16, 0.75, key(0, i)) for i in range(3)]),
        "text": corpus.need_tokenizer("tests").encode_all(TEXTS, 16),
        "label": torch.tensor([0, 1, 2]),
    }
    return Batch(tensors, torch.arange(3), torch.arange(3))


@pytest.fixture(scope="session")
def document() -> Callable[..., Document]:
    """Make a document of a 48 x 40 picture; `text` and `label` are left out when None."""

    def make(text: str | None = TEXTS[0], label: int | None = 1) -> Document:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, format="PNG")
        parts: tuple[Text | Image, ...] = (Image(file.getvalue()),)
        if text is not None:
            parts += (Text(text),)
        return Document(parts, "document", {} if label is None else {"label": label})

    return make
