"""Documents and pairs as one sequence of token ids with the pictures that belong into it (specification LCL 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.rng import Key
from altsight.core.types import Document, Example, Image, Text
from altsight.data.decode import BrokenImage
from altsight.data.sequence import Markers, TokenSequence, document_sequence, pair_sequence
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.methods.base import Samples

Drawn = tuple[TokenSequence, list[Tensor]]


@dataclass(frozen=True)
class SequencePrepare:
    """Document -> one sequence of token ids with places for its pictures (specification LCL 2.4).

    image: uint8 (max_images, 3, size, size), zeros behind the last picture; images: how many there are; text: (length,)
    int64; length: how many of the ids are used. None without a text or without a picture that has room.

    A pair is a picture before its text (with probability `image_first`) or behind it. Of a document the pictures that
    cannot be decoded are left out, as are those after the first `max_images`.
    """

    crop: Crop
    size: int
    tokenizer: Tokenizer
    image_tokens: int
    sequence: int
    max_images: int
    image_first: float
    samples: Samples

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not (document.images and document.texts):
            return None
        drawn = self._pair(document, at) if self._is_pair(document) else self._document(document, at)
        if drawn is None:
            return None
        sequence, views = drawn
        return {
            "image": F.pad(torch.stack(views), (0, 0) * 3 + (0, self.max_images - len(views))),
            "images": torch.tensor(len(views)),
            "text": sequence.ids,
            "length": torch.tensor(sequence.length),
        }

    def _is_pair(self, document: Document) -> bool:
        """Tell a pair by its shape where both kinds occur: a document of one text, its picture first, looks like it."""
        if self.samples in ("pairs", "documents"):
            return self.samples == "pairs"
        return len(document.parts) == 2 and isinstance(document.parts[0], Image)

    def _pair(self, document: Document, at: Key) -> Drawn:
        image_first = bool(at.child("image first").generator().random() < self.image_first)
        markers = Markers.after(self.tokenizer)
        text = document.texts[0]
        sequence = pair_sequence(text, self.tokenizer, markers, self.image_tokens, self.sequence, image_first)
        # The crop that every other method cuts at this key.
        return sequence, [self.crop(document.images[0], self.size, at)]

    def _document(self, document: Document, at: Key) -> Drawn | None:
        parts: list[Text | Image] = []
        views: list[Tensor] = []
        tried = 0
        for part in document.parts:
            if isinstance(part, Image):
                tried += 1
                if tried > self.max_images:
                    continue
                try:
                    views.append(self.crop(part.data, self.size, at.child(f"image {tried}")))
                except BrokenImage:
                    continue
            parts.append(part)
        markers = Markers.after(self.tokenizer)
        sequence = document_sequence(parts, self.tokenizer, markers, self.image_tokens, self.sequence)
        return None if sequence is None else (sequence, views[: sequence.images])
