"""Text and pictures as one sequence of token ids, as LCL builds it.

LCL (Yang et al. 2024, arXiv 2406.07543, sequence construction; specification LCL 2.3 and 2.4) reads a picture as
<start of image>, one placeholder for each token of its encoder, <end of image>, in the middle of the text. Deviations
from its released code, both so that no reader of a sequence needs to know of a special case:

- a picture is in a sequence with all of its tokens or not at all; there, the last one may have lost its end mark.
- padding is told by position, not by its id: CLIP's vocabulary has no id of its own for it (LCL pads with the id of
  "!", which its loss then never predicts; others pad with the end mark). The tokenizers trained here have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.types import Image, Text
from altsight.data.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Markers:
    """The ids for pictures, which a tokenizer does not have."""

    start_of_image: int
    end_of_image: int
    image: int

    @classmethod
    def after(cls, tokenizer: Tokenizer) -> Markers:
        """Return the three ids that follow the tokenizer's own: the vocabulary grows to vocab_size + 3."""
        return cls(tokenizer.vocab_size, tokenizer.vocab_size + 1, tokenizer.vocab_size + 2)

    def picture(self, image_tokens: int) -> list[int]:
        """Return the image_tokens + 2 ids that stand for one picture."""
        return [self.start_of_image, *[self.image] * image_tokens, self.end_of_image]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids with placeholders for pictures.

    ids: (context,) int64.
    length: how many of the ids are used; the rest is padding. The padding id may also occur before.
    images: how many pictures it holds, all of them complete: always the first ones of the document.
    """

    ids: Tensor
    length: int
    images: int


def document_sequence(
    parts: Sequence[Text | Image], tokenizer: Tokenizer, markers: Markers, image_tokens: int, context: int
) -> TokenSequence | None:
    """Return <start> text and pictures <end>, texts joined by spaces, cut on the right to `context` ids.

    Where the cut falls into a picture, or would leave no room for <end> after it, the sequence ends before it.

    Every stretch of text between two pictures is tokenized by itself. For a byte-level BPE that puts a space before
    each text (`train_tokenizer`) these are exactly the tokens of the whole text: it never merges across words, and
    the space that joins two texts is the first byte of a word, whether it comes from the joining or the tokenizer.

    Returns:
        The sequence; None where no picture is left in it, so that another document has to be drawn.

    Raises:
        UserError: no picture of `image_tokens` tokens fits into `context`.
    """
    _check_room(image_tokens, context)
    picture = markers.picture(image_tokens)
    ids, images = [tokenizer.start], 0
    for part in _join(parts):
        if isinstance(part, str):
            ids += _encode(tokenizer, part)
        elif len(ids) + len(picture) < context:
            ids += picture
            images += 1
        else:
            break
    return _pad([*ids[: context - 1], tokenizer.end], tokenizer, images, context) if images else None


def pair_sequence(
    text: str, tokenizer: Tokenizer, markers: Markers, image_tokens: int, context: int, image_first: bool
) -> TokenSequence:
    """Return a picture then its text and <end>, or <start>, the text then the picture; the text is cut to fit.

    As in LCL, a picture that comes first has nothing before it, not even <start>, and nothing comes after one that
    comes last. The text may have context - image_tokens - 4 tokens.

    Raises:
        UserError: no picture of `image_tokens` tokens fits into `context`.
    """
    _check_room(image_tokens, context)
    picture = markers.picture(image_tokens)
    words = _encode(tokenizer, text)[: context - image_tokens - 4]
    ids = [*picture, *words, tokenizer.end] if image_first else [tokenizer.start, *words, *picture]
    return _pad(ids, tokenizer, 1, context)


def _check_room(image_tokens: int, context: int) -> None:
    least = image_tokens + 4  # <start>, the two marks of the picture, <end>
    if context < least:
        raise UserError(
            f"a picture of {image_tokens} tokens does not fit into a context of {context} tokens: "
            f"use a context of {least} or more."
        )


def _join(parts: Sequence[Text | Image]) -> Iterator[str | Image]:
    """Yield the pictures, and before, between and after them the texts there as one (possibly empty) string."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, Text):
            texts.append(part.value)
        else:
            yield from (" ".join(texts), part)
            texts = []
    yield " ".join(texts)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.model.encode(text, add_special_tokens=False).ids)


def _pad(ids: list[int], tokenizer: Tokenizer, images: int, context: int) -> TokenSequence:
    padding = [tokenizer.pad] * (context - len(ids))
    return TokenSequence(torch.tensor(ids + padding), len(ids), images)
