"""Small documents of random pictures and few words, and a small LCL that reads them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from altsight.core.rng import key
from altsight.core.types import Batch, Document, Image, Outputs, Text
from altsight.data.views import Crop
from altsight.methods.base import Corpus, Samples
from altsight.methods.lcl import LCL
from altsight.nn.encoder import Encoder
from altsight.nn.interleaved import LanguageConfig

WIDTH, HEADS = 32, 2
CONFIG = LCL.Config(LanguageConfig(WIDTH, HEADS, layers=2), sequence=80, max_images=3, context=12)
OBJECTIVES = ("lcl", "generation", "generation_regression", "contrastive")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def document(*parts: str | int | bytes) -> Document:
    """Return a document of texts, and of pictures by their seeds or their bytes."""
    made = [Text(p) if isinstance(p, str) else Image(picture(p) if isinstance(p, int) else p) for p in parts]
    return Document(tuple(made), "made")


DOCUMENTS = (
    document("two dogs", 1, "a red house", 2, "by the sea"),
    document(3, "a green sofa", 4),
    document("a red lamp by the sofa", 5),
)


def build(encoder: Encoder, corpus: Corpus, samples: Samples = "documents", **settings: Any) -> LCL:
    method = LCL(dataclasses.replace(CONFIG, **settings), encoder, dataclasses.replace(corpus, samples=samples))
    method.init_weights(key(0, 0, "init"))
    return method


def batch_of(method: LCL, documents: Sequence[Document]) -> Batch:
    examples = [method.prepare(Crop(), 32)(d, key(0, position)) for position, d in enumerate(documents)]
    assert all(example is not None for example in examples)
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in examples[0] or {}}
    return Batch(tensors, torch.arange(len(examples)), torch.arange(len(examples)))


def embed(method: LCL, documents: Sequence[Document]) -> Outputs:
    return method.embed(batch_of(method, documents), key(0, 0))


def words(corpus: Corpus, text: str) -> list[int]:
    tokenizer = corpus.need_tokenizer("tests")
    return tokenizer.encode(text, tokenizer.count(text)).tolist()[1:-1]
