"""Tokenizers: a byte-level BPE trained on the corpus, or a known one; always fixed-length ids with start and end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.clean import TextRules, cleaner

# The library's own threads would not survive the fork of the loader's workers, and it warns of them at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, START, END = "<pad>", "<start>", "<end>"
_ROLES = {
    "pad": (PAD, "[PAD]", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    # GPT-2 has no start; VisualGPT takes the rare "<?" for it (specification 8.2).
    "start": (START, "<|startoftext|>", "<|begin_of_text|>", "[CLS]", "<bos>", "<s>", "<?"),
    "end": (END, "<|endoftext|>", "<|end_of_text|>", "[SEP]", "<eos>", "</s>"),
}
"""What known tokenizers call the three special tokens, in order of preference."""


@dataclass(frozen=True)
class Tokenizer:
    """Text -> ids. Holds the `tokenizers` JSON, so that it pickles to workers and saves with a run."""

    model: tokenizers.Tokenizer
    pad: int
    start: int
    end: int
    rules: TextRules = field(default_factory=TextRules)
    """Only other people's tokenizers have rules of their own; the JSON does not keep them."""

    def __post_init__(self) -> None:
        # A caption that spells "<end>" is text, not a command. The JSON does not keep this switch.
        self.model.encode_special_tokens = self.rules.special != "anywhere"
        cleaner(self.rules.clean)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Any, ...]]:
        # Build anew after pickling, so that the switch is set in workers too.
        return Tokenizer, (self.model, self.pad, self.start, self.end, self.rules)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self.model.get_vocab_size())

    def count(self, text: str) -> int:
        """Return the number of ids that the whole text takes, start and end included."""
        return len(self._words(text)) + 1 + self.rules.start

    def encode(self, text: str, length: int) -> Tensor:
        """Return (length,) int64: start, the text's tokens, end, padding; a long text is cut and still ends in end."""
        first = [self.start] if self.rules.start else []
        ids = [*first, *self._words(text)[: length - len(first) - 1], self.end]
        padding = [self.pad] * (length - len(ids))
        return torch.tensor(padding + ids if self.rules.pad_left else ids + padding)

    def _words(self, text: str) -> list[int]:
        """Return the ids of the whole text, without start and end."""
        text = cleaner(self.rules.clean)(text)
        special = {str(self.model.id_to_token(token)): token for token in (self.start, self.end)}
        if self.rules.special != "words" or not any(name in text for name in special):
            return list(self.model.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        for word, _ in self.model.pre_tokenizer.pre_tokenize_str(text):
            ids += [special[word]] if word in special else [token.id for token in self.model.model.tokenize(word)]
        return ids

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        """Return (n, length) int64."""
        return torch.stack([self.encode(text, length) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` up to the end token, without special tokens."""
        words = []
        for token in ids:
            if token == self.end:
                break
            if token not in (self.start, self.pad):
                words.append(int(token))
        return str(self.model.decode(words)).strip()

    def save(self, path: Path) -> None:
        """Write the tokenizer as a `tokenizers` JSON file."""
        self.model.save(str(path))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (lower-cased, white space collapsed) on `texts`; the vocabulary may come out smaller.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    least = 256 + len((PAD, START, END))
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small: use --vocab-size {least} or more.")
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return _with_roles(model, "the trained tokenizer")


def load_tokenizer(name: str) -> Tokenizer:
    """Load a `tokenizers` JSON file, or a tokenizer by its Hugging Face name (needs a network or a filled cache).

    Raises:
        UserError: it cannot be read, or has no start, end and padding token.
    """
    try:
        if Path(name).is_file():
            return _with_roles(tokenizers.Tokenizer.from_file(name), name)
        return _with_roles(tokenizers.Tokenizer.from_pretrained(name), name)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"the tokenizer '{name}' cannot be loaded ({str(error).splitlines()[0]}): give a tokenizer.json file, or "
            "none to train one on the captions."
        ) from None


def _with_roles(model: tokenizers.Tokenizer, name: str) -> Tokenizer:
    ids: dict[str, int] = {}
    for role, words in _ROLES.items():
        known = [token for token in map(model.token_to_id, words) if token is not None]
        if not known:
            raise UserError(f"{name} has no {role} token (looked for {', '.join(words)}): use another tokenizer.")
        ids[role] = known[0]
    model.no_padding()
    model.no_truncation()
    return Tokenizer(model, ids["pad"], ids["start"], ids["end"])
