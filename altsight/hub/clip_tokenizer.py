"""CLIP's tokenizer as OpenCLIP runs it: its 49,408 tokens, its cleaning of texts, its reading of special tokens."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from altsight.core.errors import UserError
from altsight.data.clean import Clean, TextRules
from altsight.data.text import Tokenizer

START, END = "<start_of_text>", "<end_of_text>"
VOCABULARY = 49_408
"""256 bytes, the same at the end of a word, the merges, start and end."""
# The source ignores case after lowering it, which leaves one s that is not s: the long one.
# ruff: noqa: RUF001
_WORDS = rf"<[sſ]tart_of_text>|{END}|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


def clip_tokenizer(clean: Clean = "lower") -> Tokenizer:
    """Return the tokenizer of OpenAI's CLIP and of every OpenCLIP model that names no other; padding is 0.

    The list of merges comes with the library open_clip. Texts give the ids that it gives, but for letters that are
    younger than the table of letters of either library.

    Raises:
        UserError: that library or ftfy is not installed.
    """
    merges = _merges()
    letters = [character for _, character in sorted(_byte_names().items(), key=_rank)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    rules = TextRules(clean, special="words")
    return Tokenizer(model, pad=0, start=vocabulary[START], end=vocabulary[END], rules=rules)


def _merges() -> list[tuple[str, str]]:
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        raise UserError("CLIP's tokenizer comes with the library open_clip: `pip install 'altsight[openclip]'`.")
    with gzip.open(Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        # A line of comment comes first, and merges beyond the vocabulary last.
        lines = file.read().split("\n")[1 : VOCABULARY - 2 * 256 - 2 + 1]
    return [(first, second) for first, second in map(str.split, lines)]


def _byte_names() -> dict[int, str]:
    """Return byte -> the letter that stands for it in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _rank(item: tuple[int, str]) -> int:
    """Return the order of the vocabulary: printable bytes first, which are named by themselves."""
    return ord(item[1])
