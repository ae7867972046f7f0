"""Text and pictures become one sequence of ids, in which no picture is ever cut."""

from __future__ import annotations

import json
from dataclasses import replace

import altsight_samples
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Image, Text
from altsight.data.documents import Sampling, read_document, sample
from altsight.data.sequence import Markers, TokenSequence, document_sequence, pair_sequence
from altsight.data.text import Tokenizer, train_tokenizer

CORPUS = ["a red fox in the snow", "a dog and a red ball", "the fox, the dog & the ball!", "it's snow on a roof"] * 5
PICTURE = Image(b"")
Parts = list[Text | Image]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(CORPUS), 300)


@pytest.fixture(scope="module")
def markers(tokenizer: Tokenizer) -> Markers:
    return Markers.after(tokenizer)


def parts_of(text: str) -> Parts:
    """Return the parts of 'a fox | * | the dog': * is a picture."""
    return [PICTURE if part == "*" else Text(part) for part in text.split(" | ")]


def words(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, tokenizer.count(text)).tolist()[1:-1]


def used(sequence: TokenSequence) -> list[int]:
    """Return the ids before the padding."""
    return sequence.ids[: sequence.length].tolist()


def reference(parts: Parts, t: Tokenizer, m: Markers, image_tokens: int, context: int) -> tuple[list[int], int] | None:
    """Steps 6 and 7 of specification LCL 2.4, on the whole sequence: (ids, number of images), or None."""
    ids, pictures = [t.start], []
    for part in parts:
        if isinstance(part, Text):
            ids += words(t, part.value)
        else:
            pictures.append(range(len(ids), len(ids) + image_tokens + 2))
            ids += [m.start_of_image] + [m.image] * image_tokens + [m.end_of_image]
    ids.append(t.end)
    if len(ids) > context:
        ids = [*ids[: context - 1], t.end]
    for number, place in enumerate(pictures):
        if place[-1] >= len(ids) - 1:  # cut, or outside altogether: then the cut text before it already has its end
            ids, pictures = [*ids[:-1][: place[0]], t.end], pictures[:number]
            break
    return (ids + [t.pad] * (context - len(ids)), len(pictures)) if pictures else None


def assert_whole(sequence: TokenSequence, t: Tokenizer, m: Markers, image_tokens: int, context: int) -> None:
    """Whatever was cut: the sequence is padded to its context, and each of its pictures is complete."""
    ids = used(sequence)
    assert sequence.ids.shape == (context,) and sequence.ids.dtype == torch.int64
    assert sequence.ids[sequence.length :].tolist() == [t.pad] * (context - sequence.length)
    starts = [i for i, token in enumerate(ids) if token == m.start_of_image]
    assert len(starts) == sequence.images > 0
    for i in starts:
        assert ids[i + 1 : i + image_tokens + 2] == [m.image] * image_tokens + [m.end_of_image]
    assert ids.count(m.image) == image_tokens * sequence.images
    assert ids.count(m.end_of_image) == sequence.images


def test_markers_follow_the_vocabulary(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    assert Markers.after(tokenizer) == Markers(start_of_image=size, end_of_image=size + 1, image=size + 2)


def test_a_document_in_full(tokenizer: Tokenizer, markers: Markers) -> None:
    m = markers
    sequence = document_sequence(parts_of("red fox | * | * | the dog"), tokenizer, m, 2, 20)
    assert sequence is not None
    picture = [m.start_of_image, m.image, m.image, m.end_of_image]
    red, fox = words(tokenizer, "red fox")
    the, dog = words(tokenizer, "the dog")
    assert used(sequence) == [tokenizer.start, red, fox, *picture, *picture, the, dog, tokenizer.end]
    assert (sequence.length, sequence.images) == (14, 2)
    assert_whole(sequence, tokenizer, m, 2, 20)


LONG = ("* | a red fox | the dog | * | snow | * | the ball", "a red fox | * | * | the dog & the roof | *")


@pytest.mark.parametrize("image_tokens", [1, 2, 5])
@pytest.mark.parametrize("text", ["*", "* | * | *", "red fox | *", "* | red fox", *LONG])
def test_every_context_ends_as_the_slow_reference(
    tokenizer: Tokenizer, markers: Markers, text: str, image_tokens: int
) -> None:
    parts = parts_of(text)
    total = text.count("*")
    full = 2 + total * (image_tokens + 2) + sum(len(words(tokenizer, p.value)) for p in parts if isinstance(p, Text))
    kept = []
    for context in range(image_tokens + 4, full + 4):
        expected = reference(parts, tokenizer, markers, image_tokens, context)
        sequence = document_sequence(parts, tokenizer, markers, image_tokens, context)
        assert (sequence and (sequence.ids.tolist(), sequence.images)) == expected
        kept.append(0)
        if sequence is not None:
            assert_whole(sequence, tokenizer, markers, image_tokens, context)
            assert used(sequence)[0] == tokenizer.start and used(sequence)[-1] == tokenizer.end
            assert used(sequence).count(tokenizer.end) == 1
            assert sequence.length == full or context < full
            kept[-1] = sequence.images
    # More room never costs a picture, and at full length all are there.
    assert kept == sorted(kept) and kept[-1] == kept[full - image_tokens - 4] == total


def test_a_picture_without_room_for_the_end_is_dropped(tokenizer: Tokenizer, markers: Markers) -> None:
    parts = parts_of("* | fox | *")
    exact = 1 + 5 + 1 + 5 + 1
    whole = document_sequence(parts, tokenizer, markers, 3, exact)
    # One id less would cost the last picture its end mark; the text ends where that picture began.
    cut = document_sequence(parts, tokenizer, markers, 3, exact - 1)
    assert whole is not None and (whole.images, whole.length) == (2, exact)
    assert cut is not None and (cut.images, cut.length) == (1, 8)
    assert used(cut) == [*used(whole)[:7], tokenizer.end]


def test_no_sequence_without_a_picture(tokenizer: Tokenizer, markers: Markers) -> None:
    assert document_sequence([], tokenizer, markers, 2, 50) is None
    assert document_sequence(parts_of("a red fox"), tokenizer, markers, 2, 50) is None
    assert document_sequence(parts_of("the red fox | * | a"), tokenizer, markers, 2, 8) is None
    assert document_sequence(parts_of("the red fox | * | a"), tokenizer, markers, 2, 9) is not None


PARTS = st.lists(st.none() | st.text(max_size=8) | st.sampled_from([*CORPUS, "'s", "<end>", "\u0301e"]), max_size=8)


@settings(max_examples=300, deadline=None)
@given(texts=PARTS)
def test_pictures_and_joints_change_no_token_of_the_text(
    tokenizer: Tokenizer, markers: Markers, texts: list[str | None]
) -> None:
    context = 600
    parts = [PICTURE, *(PICTURE if text is None else Text(text) for text in texts)]
    sequence = document_sequence(parts, tokenizer, markers, 1, context)
    assert sequence is not None and sequence.images == parts.count(PICTURE)
    text = [token for token in used(sequence) if token < tokenizer.vocab_size]
    whole = " ".join(part.value for part in parts if isinstance(part, Text))
    assert text == tokenizer.encode(whole, len(text)).tolist() and len(text) == tokenizer.count(whole)


def test_texts_are_joined_before_a_tokenizer_without_prefix_space_sees_them(markers: Markers) -> None:
    # As RoBERTa's: the first word of a text has no space before it, and is another token than later in the text.
    model = tokenizers.Tokenizer(models.WordLevel({"p": 0, "s": 1, "e": 2, "a": 3, "fox": 4, "Ġfox": 5, "Ġ": 6}, "p"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = Tokenizer(model, pad=0, start=1, end=2)
    sequence = document_sequence(parts_of("a | fox | * | fox | fox"), plain, markers, 1, 12)
    m = markers
    assert sequence is not None
    assert used(sequence) == [1, 3, 5, m.start_of_image, m.image, m.end_of_image, 4, 5, 2]


def test_padding_is_told_by_position_not_by_id(tokenizer: Tokenizer, markers: Markers) -> None:
    # CLIP's tokenizer pads with the id of the end, LCL with that of "!".
    (mark,) = words(tokenizer, "ball!")[1:]
    for pad in (tokenizer.end, mark):
        sequence = document_sequence(parts_of("ball! | *"), replace(tokenizer, pad=pad), markers, 1, 12)
        assert sequence is not None
        assert (used(sequence)[2], used(sequence)[-1], sequence.length) == (mark, tokenizer.end, 7)
        assert sequence.ids[7:].tolist() == [pad] * 5


def test_sample_documents(tokenizer: Tokenizer, markers: Markers) -> None:
    lines = (altsight_samples.documents() / "documents.jsonl").read_text("utf-8").splitlines()
    lost = 0
    for position, line in enumerate(lines):
        document = read_document(json.loads(line))
        assert document is not None
        drawn = sample(document, Sampling(), key(0, position))
        parts: Parts = [Text(part) if isinstance(part, str) else PICTURE for part in drawn]
        sequence = document_sequence(parts, tokenizer, markers, 4, 2048)
        expected = reference(parts, tokenizer, markers, 4, 2048)
        assert (sequence and (sequence.ids.tolist(), sequence.images)) == expected
        lost += sequence is None
    assert 0 < lost < len(lines) / 4


def targets(sequence: TokenSequence, markers: Markers) -> list[int]:
    """Return what the language model has to predict (specification LCL 2.5): not pictures, their ends, padding."""
    return [token for token in used(sequence)[1:] if token not in (markers.image, markers.end_of_image)]


def test_worked_example_of_the_losses(tokenizer: Tokenizer, markers: Markers) -> None:
    # ViT-B/32: 49 tokens a picture, context 128; a text of two tokens.
    one, two = words(tokenizer, "red fox")
    text_first = pair_sequence("red fox", tokenizer, markers, 49, 128, image_first=False)
    image_first = pair_sequence("red fox", tokenizer, markers, 49, 128, image_first=True)
    assert targets(text_first, markers) == [one, two, markers.start_of_image]
    assert targets(image_first, markers) == [one, two, tokenizer.end]
    # A picture has a context, and so a contrastive term, unless its start is the very first id.
    assert used(text_first).index(markers.start_of_image) == 3
    assert used(image_first).index(markers.start_of_image) == 0
    assert tokenizer.start not in used(image_first) and tokenizer.end not in used(text_first)
    for sequence in (text_first, image_first):
        assert sequence.length == 54
        assert_whole(sequence, tokenizer, markers, 49, 128)


@pytest.mark.parametrize("image_first", [False, True])
def test_long_texts_of_pairs_are_cut(tokenizer: Tokenizer, markers: Markers, image_first: bool) -> None:
    # ViT-B/16: 196 tokens a picture, context 280, and so 80 for the text.
    sequence = pair_sequence("fox " * 300, tokenizer, markers, 196, 280, image_first)
    assert sequence.length == 279
    assert used(sequence).count(words(tokenizer, "fox")[0]) == 80
    assert_whole(sequence, tokenizer, markers, 196, 280)


@pytest.mark.parametrize("image_first", [False, True])
def test_pairs_in_every_context(tokenizer: Tokenizer, markers: Markers, image_first: bool) -> None:
    text = "a red fox in the snow"
    ids = words(tokenizer, text)
    for context in range(7, 7 + len(ids) + 3):
        sequence = pair_sequence(text, tokenizer, markers, 3, context, image_first)
        assert_whole(sequence, tokenizer, markers, 3, context)
        kept = ids[: context - 7]
        picture = markers.picture(3)
        expected = [*picture, *kept, tokenizer.end] if image_first else [tokenizer.start, *kept, *picture]
        assert used(sequence) == expected


@pytest.mark.parametrize("context", [4, 5, 6])
def test_a_context_without_room_for_a_picture_is_refused(tokenizer: Tokenizer, markers: Markers, context: int) -> None:
    with pytest.raises(UserError, match="context of 7 or more"):
        pair_sequence("fox", tokenizer, markers, 3, context, image_first=True)
    with pytest.raises(UserError, match="context of 7 or more"):
        document_sequence([PICTURE], tokenizer, markers, 3, context)
