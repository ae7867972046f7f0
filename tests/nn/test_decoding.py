"""Writing by a script, beams against an exhaustive search, and how often a nucleus draws each token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from altsight.core.errors import UserError
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.nn.decoding import BEAM, Continue, Decoding, beam, generate, nucleus, without_repeats, write

IMAGES = torch.arange(4 * 3 * 8 * 8, dtype=torch.int32).view(4, 3, 8, 8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a red house", "two dogs"]), 300)


def scripted(tokenizer: Tokenizer, script: list[list[int]], loud: list[int]) -> Continue:
    """Wants `script[row][t]` as the token at place t, and the `loud` tokens even more."""
    wanted = torch.tensor(script)

    def step(ids: Tensor, rows: Tensor) -> Tensor:
        logits = torch.zeros(len(ids), tokenizer.vocab_size)
        logits[:, loud] = 9.0
        logits[torch.arange(len(ids)), wanted[rows, ids.shape[1]]] = 5.0
        return logits

    return step


def test_greedy_follows_the_largest_logit_to_the_end_token(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.start, tokenizer.end
    step = scripted(tokenizer, [[0, 0, 20, end, 50, 50, 50], [0, 0, 30, 31, 32, end, 50]], [tokenizer.pad, start])
    ids = generate(step, tokenizer, IMAGES[:2], torch.tensor([[start, 7]] * 2), 7)
    assert ids.tolist() == [[start, 7, 20, end, end, end], [start, 7, 30, 31, 32, end]]


def test_greedy_stops_at_the_longest_length(tokenizer: Tokenizer) -> None:
    step = scripted(tokenizer, [[20] * 9], [tokenizer.pad])
    ids = generate(step, tokenizer, IMAGES[:1], torch.tensor([[tokenizer.start]]), 5)
    assert ids.tolist() == [[tokenizer.start, 20, 20, 20, 20]]


def test_greedy_can_stop_where_padding_is_the_end_token(tokenizer: Tokenizer) -> None:
    same = dataclasses.replace(tokenizer, pad=tokenizer.end)
    step = scripted(same, [[0, 20, same.end, 50, 50]], [same.start])
    ids = generate(step, same, IMAGES[:1], torch.tensor([[same.start]]), 5)
    assert ids.tolist() == [[same.start, 20, same.end]]


def test_bert_special_tokens_are_never_written() -> None:
    """MUG's demo shuts out 103, 101, 100 and 0: [MASK], [CLS], [UNK] and [PAD]; [SEP] ends the caption."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "dog": 5}
    bert = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]")), pad=0, start=2, end=3)
    step = scripted(bert, [[0, 5, 3, 5]], [0, 1, 2, 4])
    assert generate(step, bert, IMAGES[:1], torch.tensor([[2]]), 4).tolist() == [[2, 5, 3]]


def test_write_starts_with_the_prefix_and_keeps_to_the_length(tokenizer: Tokenizer) -> None:
    words = tokenizer.model.encode("two dogs", add_special_tokens=False).ids
    end = tokenizer.end
    script = [[0] * (1 + len(words)) + [end] * 9] * 2
    for decoding in (Decoding(), BEAM):
        written = write(scripted(tokenizer, script, []), tokenizer, IMAGES[:2], "two dogs", 16, decoding)
        assert written == ["two dogs"] * 2
        assert write(scripted(tokenizer, [[40] * 9], []), tokenizer, IMAGES[:1], "two dogs", 1, decoding) == [""]


WORDS, END = 4, 3
"""A vocabulary of 0, 1, 2 and the end."""


def table(seed: int, length: int, images: int = 2) -> Continue:
    """Logits that depend on the image and on every token so far."""
    size = WORDS**length
    logits = 2 * torch.randn(images, size, WORDS, generator=torch.Generator().manual_seed(seed))

    def step(ids: Tensor, rows: Tensor) -> Tensor:
        place = torch.zeros(len(ids), dtype=torch.long)
        for token in ids.T:
            place = (place * WORDS + token + 1) % size
        return logits[rows, place]

    return step


def score_of(step: Continue, ids: list[int], start: int, row: int, penalty: float) -> float:
    """Log-probability of what follows the first `start` tokens, over a power of its number."""
    total = 0.0
    for t in range(start, len(ids)):
        logits = step(torch.tensor([ids[:t]]), torch.tensor([row]))[0].tolist()
        total += logits[ids[t]] - math.log(sum(math.exp(x) for x in logits))
    return total / (len(ids) - start) ** penalty


def all_captions(start: list[int], longest: int) -> list[list[int]]:
    """Every caption that ends at its first end token, or is as long as it may be."""
    found = []
    for length in range(len(start) + 1, longest + 1):
        for rest in itertools.product(range(WORDS), repeat=length - len(start)):
            if END not in rest[:-1] and (rest[-1] == END or length == longest):
                found.append([*start, *rest])
    return found


def trimmed(ids: list[int]) -> list[int]:
    return ids[: ids.index(END) + 1] if END in ids else ids


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_a_beam_as_wide_as_everything_finds_the_best_caption(penalty: float) -> None:
    lengths = set()
    for seed in range(8):
        step = table(seed, 5)
        found = beam(step, END, torch.tensor([[0, 1]] * 2), 5, WORDS**3, penalty)[:, 0]
        for row in range(2):
            best = max(all_captions([0, 1], 5), key=lambda ids: score_of(step, ids, 2, row, penalty))
            assert trimmed(found[row].tolist()) == best
            lengths.add(len(best))
    assert len(lengths) > 1


def slow_beam(step: Continue, start: list[int], longest: int, row: int, beams: int, penalty: float) -> list[list[int]]:
    """Lists of (ids, done), kept in order of their score."""
    kept = [start]
    for _ in range(longest - len(start)):
        grown = []
        for ids in kept:
            ended = END in ids[len(start) :]
            grown += [ids] if ended else [[*ids, token] for token in range(WORDS)]
        kept = sorted(grown, key=lambda ids: -score_of(step, ids, len(start), row, penalty))[:beams]
    return kept


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_beams_equal_reference(beams: int) -> None:
    for seed in range(6):
        step = table(seed, 5, images=3)
        found = beam(step, END, torch.tensor([[1]] * 3), 6, beams, 1.0)
        for row in range(3):
            assert [trimmed(ids) for ids in found[row].tolist()] == slow_beam(step, [1], 6, row, beams, 1.0)


def test_one_beam_is_greedy_and_more_find_what_it_misses(tokenizer: Tokenizer) -> None:
    """A first token that is a bit less likely, after which all is certain."""
    a, b, end = 20, 30, tokenizer.end

    def step(ids: Tensor, rows: Tensor) -> Tensor:
        chances = torch.full((len(ids), tokenizer.vocab_size), 1e-9)
        for row, last in enumerate(ids[:, -1].tolist()):
            if last == tokenizer.start:
                chances[row, a], chances[row, b] = 0.55, 0.45
            else:
                chances[row, end] = 0.3 if last == a else 1.0
                chances[row, 40:50] = 0.07 if last == a else 1e-9
        return chances.log()

    start = torch.full((1, 1), tokenizer.start)
    greedy = generate(step, tokenizer, IMAGES[:1], start, 3)
    assert greedy.tolist() == [[tokenizer.start, a, end]]
    assert torch.equal(generate(step, tokenizer, IMAGES[:1], start, 3, Decoding("beam", beams=1)), greedy)
    assert generate(step, tokenizer, IMAGES[:1], start, 3, BEAM).tolist() == [[tokenizer.start, b, end]]


def test_a_nucleus_draws_what_it_holds_as_often_as_it_is_likely() -> None:
    """Of 0.5, 0.25, 0.15 and 0.1 the first three reach 0.8; a temperature of 1/2 squares the chances."""
    chances = torch.tensor([0.1, 0.5, 0.15, 0.25])
    draws = (torch.arange(10_000) + 0.5) / 10_000
    for temperature, expected in ((1.0, [0, 50, 15, 25]), (0.5, [0, 100, 0, 25])):
        found = nucleus(chances.log().expand(10_000, -1), draws, 0.8, temperature).bincount(minlength=4) / 10_000
        share = torch.tensor(expected) / sum(expected)
        torch.testing.assert_close(found, share, rtol=0, atol=2e-4)


def test_a_nucleus_holds_at_least_the_likeliest_token_and_at_most_all() -> None:
    logits, draws = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)), torch.rand(200)
    draws[:2] = torch.tensor([0.0, 1.0])  # what fp32 may make of a draw just below 1
    assert torch.equal(nucleus(logits, draws, 1e-6, 1.0), logits.argmax(dim=1))
    last = nucleus(logits, torch.ones(200), 1.0, 1.0)
    assert torch.equal(last, logits.argmin(dim=1))


def test_draws_depend_on_seed_and_image_and_not_on_the_batch(tokenizer: Tokenizer) -> None:
    def step(ids: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros(len(ids), tokenizer.vocab_size)

    def written(images: Tensor, seed: int = 0) -> list[list[int]]:
        start = torch.full((len(images), 1), tokenizer.start)
        ids = generate(step, tokenizer, images, start, 9, Decoding("nucleus", seed=seed))
        assert not torch.isin(ids[:, 1:], torch.tensor([tokenizer.pad, tokenizer.start])).any()
        return [row[: row.index(tokenizer.end)] if tokenizer.end in row else row for row in ids.tolist()]

    whole = written(IMAGES)
    assert [written(IMAGES[i : i + 1])[0] for i in range(4)] == whole
    assert len({tuple(row) for row in whole}) == 4
    assert written(IMAGES, seed=1) != whole


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"beams": 0}, "a beam of 0 captions"),
        ({"top_p": 0.0}, "a share of 0"),
        ({"top_p": 1.2}, "a share of 1.2"),
        ({"temperature": 0.0}, "a temperature of 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Decoding(**settings)


def test_a_word_twice_in_a_row_is_kept_once() -> None:
    assert without_repeats("a a red red  dog and a dog dog") == "a red dog and a dog"
