"""Tokenizers give fixed-length ids that lead back to the text."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from altsight.core.errors import UserError
from altsight.data.text import END, PAD, START, Tokenizer, load_tokenizer, train_tokenizer
from altsight.nn.caption import is_text

CORPUS = ["a red fox in the snow", "A dog and a red ball", "the fox, the dog & the ball", "snow on a red roof"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(CORPUS), 300)


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.start, tokenizer.end) == (0, 1, 2)
    assert 259 < tokenizer.vocab_size <= 300


def test_layout(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red fox", 12)
    words = tokenizer.count("red fox") - 2
    assert ids.dtype == torch.int64
    assert ids[0] == tokenizer.start
    assert ids[words + 1] == tokenizer.end
    assert ids[words + 2 :].tolist() == [tokenizer.pad] * (12 - words - 2)
    assert not set(ids[1 : words + 1].tolist()) & {tokenizer.pad, tokenizer.start, tokenizer.end}


def test_frequent_words_are_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.count("red the fox") == 5


def test_a_long_text_is_cut_and_still_ends_in_end(tokenizer: Tokenizer) -> None:
    text = "fox " * 50
    whole, cut = tokenizer.encode(text, 100), tokenizer.encode(text, 10)
    assert tokenizer.count(text) == 52
    assert cut.tolist() == [*whole[:9].tolist(), tokenizer.end]


def test_many_at_once_are_each_alone(tokenizer: Tokenizer) -> None:
    texts = ["a fox", "", "the snow " * 20]
    together = tokenizer.encode_all(texts, 9)
    assert together.shape == (3, 9)
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row, tokenizer.encode(text, 9))
    assert together[1].tolist() == [tokenizer.start, tokenizer.end] + [tokenizer.pad] * 7


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_unicode_comes_back_normalised(tokenizer: Tokenizer, text: str) -> None:
    normal = tokenizer.model.normalizer.normalize_str(text)
    ids = tokenizer.encode(text, 2 + 4 * 3 * 40)
    assert tokenizer.decode(ids) == normal.strip()


def test_normalisation_collapses_space_and_case(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("  The\n\tRED  Fox ", 20)) == "the red fox"


def test_bytes_that_training_never_saw_are_not_lost(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("雪狐 🦊", 40)) == "雪狐 🦊"


@pytest.mark.parametrize("again", [lambda t: t, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_special_tokens_in_a_caption_are_text(tokenizer: Tokenizer, again: object) -> None:
    copied = again(tokenizer)  # type: ignore[operator]
    text = f"fox {END} {PAD} {START} snow"
    ids = copied.encode(text, 60)
    assert (ids == copied.end).sum() == 1
    assert (ids == copied.start).sum() == 1
    assert copied.decode(ids) == text


def test_training_is_repeatable(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(CORPUS), 300).model.to_str() == tokenizer.model.to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab-size 259 or more"):
        train_tokenizer(iter(CORPUS), 258)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert torch.equal(loaded.encode(f"a fox {END}", 20), tokenizer.encode(f"a fox {END}", 20))
    assert (loaded.pad, loaded.start, loaded.end) == (0, 1, 2)


def test_known_tokenizers_are_asked_for_their_own_special_tokens(tmp_path: Path) -> None:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "fox": 4}
    model = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.enable_padding(length=30)
    model.enable_truncation(2)
    model.save(str(tmp_path / "bert.json"))
    loaded = load_tokenizer(str(tmp_path / "bert.json"))
    assert loaded.encode("fox fox dog fox", 8).tolist() == [1, 4, 4, 3, 4, 2, 0, 0]


def test_gpt2_starts_with_a_rare_token_of_its_own(tmp_path: Path) -> None:
    """It has <|endoftext|> alone; a start with that id would end every caption before its first word."""
    words = {"<|endoftext|>": 0, "<?": 1, "a": 2, "cat": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "gpt2.json"))
    loaded = load_tokenizer(str(tmp_path / "gpt2.json"))
    assert loaded.encode("a cat", 6).tolist() == [1, 2, 3, 0, 0, 0]
    assert is_text(loaded.encode("a cat", 6)[None], loaded.end).tolist() == [[True] * 4 + [False] * 2]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(models.WordLevel({"fox": 0}, unk_token="fox"))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(UserError, match=r"bare\.json has no pad token"):
        load_tokenizer(str(tmp_path / "bare.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json' cannot be loaded .*none to train one"):
        load_tokenizer(str(tmp_path / "broken.json"))
