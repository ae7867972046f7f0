"""Records of MMC4 and OBELICS are read whatever is in them, and documents are drawn from them by LCL's rules."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from typing import Any

import altsight_samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.data.documents import Interleaved, Placed, Sampling, pair, read_document, sample

TEXTS = ["zero", "one", "two", "three"]


def info(name: Any, sentence: Any, similarity: Any = 0.3, **more: Any) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": sentence, "matched_sim": similarity, **more}


def read(**fields: Any) -> Interleaved:
    document = read_document(fields)
    assert document is not None
    return document


def mmc4(*infos: Any, texts: list[Any] = TEXTS) -> Interleaved:
    return read(text_list=texts, image_info=list(infos))


def shown(parts: list[str | Placed]) -> tuple[str, ...]:
    """Return the texts, and the images as <name>."""
    return tuple(part if isinstance(part, str) else f"<{part.names[0]}>" for part in parts)


def keys(count: int) -> list[Key]:
    return [key(7, position) for position in range(count)]


def within(count: int, draws: int, chance: float) -> bool:
    """Whether `count` is inside four standard deviations of the binomial distribution."""
    return abs(count - draws * chance) <= 4 * math.sqrt(draws * chance * (1 - chance))


def test_mmc4_is_read_in_the_order_of_its_sentences() -> None:
    bee = info("b.jpg", 2, 0.25, raw_url="http://x/b.jpg", alt="a bee", face_detections=None)
    assert mmc4(bee, info("a.jpg", 0, None), {"raw_url": "http://x/c.jpg", "matched_text_index": 2}).images == (
        Placed(("a.jpg",), None, 0, None, ""),
        Placed(("b.jpg", "http://x/b.jpg"), None, 2, 0.25, "a bee"),
        Placed(("http://x/c.jpg",), None, 2, None, ""),
    )


NAMELESS: list[Any] = [{"matched_text_index": 1, "matched_sim": 0.3}, info("", 1), info(3, 1), "a.jpg", None, []]
NOWHERE = [{"image_name": "a"}, *(info("a", sentence) for sentence in (4, -1, "1", True, 1.5, [[1]], None))]
UNMEASURED = [info("a", 1, similarity) for similarity in (math.nan, math.inf, -math.inf, "0.3", True, [0.3])]


@pytest.mark.parametrize("broken", NAMELESS + NOWHERE + UNMEASURED, ids=repr)
def test_a_malformed_image_is_dropped_alone(broken: Any) -> None:
    document = mmc4(info("good", 2), broken, info("fine", 1))
    assert [image.names for image in document.images] == [("fine",), ("good",)]


def test_a_sentence_that_is_no_text_keeps_its_number_but_has_no_image() -> None:
    document = mmc4(*(info(f"{i}.jpg", i) for i in range(4)), texts=["zero", None, " \n", "three"])
    assert document.texts == ("zero", "", "", "three") and len(document.images) == 2
    assert shown(sample(document, Sampling(before=0.0), key(0, 0))) == ("zero", "<0.jpg>", "three", "<3.jpg>")


def test_half_of_a_surrogate_pair_becomes_valid_text() -> None:
    document = mmc4(info("a\ud800.jpg", 0, alt="\udfff\0"), texts=["a \ud83d fox"])
    assert (document.texts, document.images[0].names, document.images[0].alt) == (("a ? fox",), ("a?.jpg",), "?")


def test_obelics_images_belong_to_the_text_that_follows_or_to_the_last() -> None:
    document = read(images=["a", None, "b", "c", None, "d"], texts=[None, "one", None, None, "two", None])
    assert document.texts == ("one", "two")
    places = [(image.names[0], image.sentence, image.before) for image in document.images]
    assert places == [("a", 0, True), ("b", 1, True), ("c", 1, True), ("d", 1, False)]


JPEG = b"\xff\xd8"
ELEMENTS: list[tuple[Any, tuple[str, ...], bytes | None]] = [
    ("http://x/a.jpg", ("http://x/a.jpg",), None),
    (JPEG, (), JPEG),
    ({"bytes": JPEG, "path": "a.jpg"}, ("a.jpg",), JPEG),
    ({"bytes": JPEG, "path": None}, (), JPEG),
    ({"bytes": None, "path": "a.jpg"}, ("a.jpg",), None),
    ({"bytes": b"", "path": "a.jpg"}, ("a.jpg",), None),
]


@pytest.mark.parametrize(("element", "names", "data"), ELEMENTS)
def test_obelics_elements(element: Any, names: tuple[str, ...], data: bytes | None) -> None:
    assert read(images=[element, None], texts=[None, "text"]).images == (Placed(names, data, 0, None, "", before=True),)


@pytest.mark.parametrize("element", ["", b"", {}, {"bytes": "text", "path": 3}, 7, True, [b"x"], None])
def test_obelics_elements_that_are_no_image(element: Any) -> None:
    document = read(images=[element, None, "u"], texts=[None, "text", None])
    assert document.images == (Placed(("u",), None, 0, None, "", before=False),)


def test_obelics_metadata_gives_a_second_name_and_the_alt_text() -> None:
    about = [None, {"src": "http://x/a", "alt_text": "a fox"}, {"src": "u2"}]
    for metadata in (about, json.dumps(about)):
        first, second = read(images=[None, "u1", "u2"], texts=["text", None, None], metadata=metadata).images
        assert (first.names, first.alt) == (("u1", "http://x/a"), "a fox")
        assert (second.names, second.alt) == (("u2",), "")


@pytest.mark.parametrize("metadata", ["{", "[" * 100_000, '{"src": "x"}', 5, [3], ["x", {"src": 4}, {"src": "y"}]])
def test_obelics_metadata_may_be_anything(metadata: Any) -> None:
    document = read(images=["u", None], texts=[None, "text"], metadata=metadata)
    assert document.images == (Placed(("u",), None, 0, None, "", before=True),)


LAYOUTS = (("text_list", "image_info"), ("images", "texts"))
ANY_TEXT = st.text(st.characters(codec=None), max_size=3)
LEAVES = st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | ANY_TEXT | st.binary()
NONSENSE = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=6)
LIKELY = {"image_name": ANY_TEXT, "path": ANY_TEXT, "bytes": st.binary(), "matched_text_index": st.integers(0, 3)}
UNLIKELY = dict.fromkeys(["raw_url", "matched_sim", "alt", "src", "alt_text", *LIKELY], NONSENSE)
INFOS = st.lists(st.fixed_dictionaries(LIKELY) | st.fixed_dictionaries({}, optional=UNLIKELY) | NONSENSE, min_size=1)
SENTENCES = st.lists(st.just("text") | ANY_TEXT | NONSENSE, min_size=4)
RECORDS = (
    st.fixed_dictionaries({"text_list": SENTENCES, "image_info": INFOS})
    | st.fixed_dictionaries({"images": INFOS, "texts": SENTENCES, "metadata": INFOS | NONSENSE})
    | st.dictionaries(st.sampled_from(["metadata", *LAYOUTS[0], *LAYOUTS[1]]), INFOS | NONSENSE)
)


@settings(max_examples=400, deadline=None)
@given(RECORDS)
def test_any_record_gives_a_valid_document_or_none(record: dict[str, Any]) -> None:
    document = read_document(record)
    assert (document is not None) == any(all(isinstance(record.get(n), list) for n in layout) for layout in LAYOUTS)
    if document is None:
        return
    sentences = [image.sentence for image in document.images]
    assert sentences == sorted(sentences) and all(document.texts[i] for i in sentences)
    assert all(all(map(str.encode, image.names)) and (image.names or image.data) for image in document.images)
    assert all(image.similarity is None or abs(image.similarity) < math.inf for image in document.images)
    sampling, at = Sampling(min_similarity=-math.inf), key(0, 0)
    parts = sample(document, sampling, at)
    assert bool(parts) == bool(document.images) == bool(pair(document, sampling, at))
    assert not parts or [part for part in parts if isinstance(part, str)] == list(filter(None, document.texts))


def outcomes(record: dict[str, Any], sampling: Sampling) -> set[tuple[str, ...]]:
    """Return every document that steps 1, 2, 3 and 5 of specification LCL 2.4 may make of an MMC4 record."""
    matched: dict[int, list[str]] = {}
    for image in record["image_info"]:
        if image["matched_sim"] is None or image["matched_sim"] >= sampling.min_similarity:
            matched.setdefault(image["matched_text_index"], []).append(image["image_name"])
    sentences = sorted(matched)[: sampling.max_images]
    found = set()
    for names in product(*(matched[sentence] for sentence in sentences)):
        for sides in product((0, 1), repeat=len(sentences)):
            text = list(record["text_list"])
            for name, sentence, side in reversed(list(zip(names, sentences, sides, strict=True))):
                text.insert(sentence + side, f"<{name}>")
            found.add(tuple(text) if sentences else ())
    return found


MATCHES = st.tuples(st.integers(0, 3), st.sampled_from([None, 0.1, 0.24, 0.239999, 10**400]))  # no float is as large


@settings(max_examples=150, deadline=None)
@given(st.lists(MATCHES, max_size=6), st.integers(1, 4), st.integers(0, 2**40))
def test_every_drawn_document_follows_the_rules(matches: list[Any], max_images: int, position: int) -> None:
    infos = [info(f"{i}.jpg", *match) for i, match in enumerate(matches)]
    sampling = Sampling(max_images=max_images)
    parts = sample(mmc4(*infos), sampling, key(0, position))
    assert shown(parts) in outcomes({"text_list": TEXTS, "image_info": infos}, sampling)


def test_every_document_that_the_rules_allow_is_drawn_equally_often() -> None:
    infos = [info("d", 3), info("b", 1), info("low", 0, 0.1), info("c", 1), info("a", 0, None)]
    sampling, draws = Sampling(max_images=2), 1600
    expected = outcomes({"text_list": TEXTS, "image_info": infos}, sampling)
    drawn = Counter(shown(sample(mmc4(*infos), sampling, at)) for at in keys(draws))
    assert len(expected) == 8 and drawn.keys() == expected
    assert all(within(count, draws, 1 / 8) for count in drawn.values())


def test_defaults_are_those_of_lcl() -> None:
    document = mmc4(*(info(f"{i}", i, 0.2399 if i == 1 else 0.24) for i in range(9)), texts=list("abcdefghi"))
    drawn = sample(document, Sampling(), key(0, 0))
    assert [part.sentence for part in drawn if isinstance(part, Placed)] == [0, 2, 3, 4, 5, 6]


def test_obelics_keeps_the_places_of_its_page_and_one_image_in_each() -> None:
    images, texts = ["a", "b", None, None, "c", None, "d", "e"], [None, None, "one", "two", None, "three", None, None]
    drawn = {shown(sample(read(images=images, texts=texts), Sampling(), at)) for at in keys(50)}
    assert drawn == {(f"<{a}>", "one", "two", "<c>", "three", f"<{d}>") for a in "ab" for d in "de"}


def test_nothing_is_drawn_without_a_similar_image() -> None:
    for document in (mmc4(), mmc4(info("a", 1, 0.1)), read(images=["an image without any text"], texts=[None])):
        assert sample(document, Sampling(), key(0, 0)) == []
        assert pair(document, Sampling(), key(0, 0)) is None


def test_pairs_are_any_similar_image_with_its_sentence_whatever_max_images() -> None:
    document = mmc4(info("a", 0), info("b", 2), info("c", 2), info("low", 3, 0.1))
    drawn = Counter(shown(list(pair(document, Sampling(max_images=1), at) or ())) for at in keys(900))
    assert drawn.keys() == {("zero", "<a>"), ("two", "<b>"), ("two", "<c>")}
    assert all(within(count, 900, 1 / 3) for count in drawn.values())


@pytest.mark.parametrize("before", [0.0, 0.25, 0.5, 1.0])
def test_images_stand_before_their_sentence_as_often_as_asked(before: float) -> None:
    document, draws = mmc4(info("a", 0), info("b", 2)), 2000
    seen = [shown(sample(document, Sampling(before=before), at)) for at in keys(draws)]
    first = [parts.index("<a>") < parts.index("zero") for parts in seen]
    second = [parts.index("<b>") < parts.index("two") for parts in seen]
    assert within(sum(first), draws, before) and within(sum(second), draws, before)
    assert within(sum(a and b for a, b in zip(first, second, strict=True)), draws, before**2)


def test_the_key_alone_decides() -> None:
    document = mmc4(*(info(f"{i}", i % 4) for i in range(12)))
    once, again = ([(sample(document, Sampling(), k), pair(document, Sampling(), k)) for k in keys(30)] for _ in "12")
    assert once == again and len({shown(parts) for parts, _ in once}) > 20


def test_the_sample_documents_are_read_whole() -> None:
    folder = altsight_samples.documents()
    for position, line in enumerate((folder / "documents.jsonl").read_text("utf-8").splitlines()):
        record = json.loads(line)
        document = read_document(record)
        assert document is not None and len(document.images) == len(record["image_info"]) > 0
        assert document.texts == tuple(text.strip() for text in record["text_list"])
        assert all((folder / "images" / image.names[0]).is_file() for image in document.images)
        parts = sample(document, Sampling(), key(0, position))
        assert tuple(part for part in parts if isinstance(part, str)) == document.texts
        images = [part for part in parts if isinstance(part, Placed)]
        matched = {image["matched_text_index"] for image in record["image_info"]}
        assert [image.sentence for image in images] == sorted(matched)[:6]
        for image in images:
            assert document.texts[image.sentence] in parts[max(parts.index(image) - 1, 0) :][:3]


def test_documents_without_images_are_refused() -> None:
    with pytest.raises(UserError, match="--max-images 1 or more"):
        Sampling(max_images=0)
