"""Tokenizers of other libraries, id for id, on texts that are meant to break them."""

# ruff: noqa: RUF001
from __future__ import annotations

import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.clean import TextRules, cleaner
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.hub.clip_tokenizer import clip_tokenizer

PIECES = (
    *("a photo of a dog", "The QUICK brown Fox's", "don't, won't; I'll we've you're I'm he'd", "IT'S 'Twas ROCK'N'R"),
    *(
        "2,000 x 1.5e-3 = 100%",
        "0123456789",
        "!!!???...---___",
        "(){}[]<>|\\/~^`@#$%&*",
        "#tag @user http://a.b/c?d=e&f",
    ),
    "Ελλάδα ΣΊΣΥΦΟΣ",
    *("café naïve Ångström ǅ ŉ ﬁ ﬅ ß ẞ İ ı ſ 'ſ <ſtart_of_text>", "Привет, мир", "שלום עולם", "مرحبا"),
    *("नमस्ते दुनिया", "สวัสดี", "日本語のテキスト", "中文，标点。", "한국어", "Ⅻ ½ ² ٣ ໓ 五", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚"),
    *("😀👩‍🚀🏳️‍🌈🇩🇪", "❤️☺︎", "e\u0301 a\u0308\u0323", "\u200b\u200d\ufeff\u00ad", "\x00\x07\x1b[31m\x7f\x85"),
    *(" \t\n\r\x0b\x0c\x1c\x1f", "\u00a0\u2003\u3000\u2028"),
    *("&amp;amp; &lt;b&gt; &#39; &quot; &nbsp; &eacute; &bogus;", "&#128512;"),
    *("âœ” schÃ¶n â€œquotesâ€\x9d Ã©", "‘single’ “double” – — …", "\ud7ff\ue000\U0010ffff", "ＦＵＬＬ　ＷＩＤＴＨ"),
    *("<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "<|startoftext|>", "<|endoftext|>"),
    *("</w>", "</s>", "<pad>", "[CLS]"),
    *("", " ", "antidisestablishmentarianism" * 9, "word " * 120, "." * 300),
)


def difficult(count: int = 1000) -> list[str]:
    """Return `count` seeded texts: the pieces themselves, then shuffles of them, cut anywhere and glued together."""
    at = key(0, 0, "difficult texts").generator()
    texts = list(PIECES)
    while len(texts) < count:
        chosen = [PIECES[i] for i in at.integers(len(PIECES), size=at.integers(1, 6))]
        cut = [piece[int(at.integers(len(piece) + 1)) :] if at.random() < 0.5 else piece for piece in chosen]
        texts.append(("", " ", "\n")[at.integers(3)].join(cut) + random_letters(at))
    return texts[:count]


def random_letters(at: np.random.Generator) -> str:
    """Return up to 8 characters from anywhere in Unicode.

    Surrogates are left out, which no text may hold, and code points without a character: what the newest versions of
    Unicode put there is a letter in the tables of some libraries only.
    """
    letters = map(chr, at.integers(1, 0x2FFFF, size=at.integers(0, 9)))
    return "".join(letter for letter in letters if unicodedata.category(letter) not in ("Cs", "Cn"))


@pytest.mark.parametrize("context", [77, 16])
def test_clip_tokens_are_those_of_open_clip(context: int) -> None:
    import open_clip

    texts = difficult()
    tokenizer, theirs = clip_tokenizer(), open_clip.tokenize(texts, context)
    ours = tokenizer.encode_all(texts, context)
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert not wrong
    # Texts that are too long were among them, and end in the end token as theirs do.
    full = ours[:, -1] != 0
    assert full.any() and (ours[full, -1] == tokenizer.end).all()


def test_the_vocabulary_is_that_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    assert clip_tokenizer().model.get_vocab() == SimpleTokenizer().encoder


@pytest.mark.parametrize("name", ["lower", "whitespace", "canonicalize"])
def test_cleaning_is_that_of_open_clip(name: str) -> None:
    from open_clip.tokenizer import get_clean_fn

    theirs, ours = get_clean_fn(name), cleaner(name)  # type: ignore[arg-type]
    assert [ours(text) for text in difficult()] == [theirs(text) for text in difficult()]


def test_clip_tokens_read_back_as_text() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer.encode("A café, 中文 😀", 77).tolist()) == "a café , 中文 😀"


def test_rules_survive_the_way_to_a_worker() -> None:
    tokenizer = pickle.loads(pickle.dumps(clip_tokenizer()))
    assert tokenizer.rules == TextRules("lower", special="words")
    assert tokenizer.encode("A &amp;amp; B <end_of_text>", 8).tolist() == [49406, 320, 261, 321, 49407, 49407, 0, 0]


def test_own_tokenizers_keep_special_names_as_text(tmp_path: Path) -> None:
    own = train_tokenizer(iter(["a small text <end> with words"] * 20), 300)
    assert own.rules == TextRules()
    ids = own.encode("<end>", 10).tolist()
    assert ids.count(own.end) == 1 and len(set(ids)) > 3


def test_rules_frame_the_ids() -> None:
    own = train_tokenizer(iter(["one two three"] * 20), 300)
    bare = Tokenizer(own.model, own.pad, own.start, own.end, TextRules(start=False, pad_left=True, clean="letters"))
    words = own.encode("one two", 8).tolist()[1:]
    length = words.index(own.end) + 1
    assert bare.encode("One, TWO!", 8).tolist() == [own.pad] * (8 - length) + words[:length]
    assert bare.count("one two") == own.count("one two") - 1 == length


def test_without_open_clip_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altsight.hub.clip_tokenizer.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'altsight\[openclip\]'"):
        clip_tokenizer()
