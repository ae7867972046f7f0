"""Captions from templates, labels from fields, documents from shards."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.captions import Captions
from altsight.data.prepare import read_pairs
from altsight.data.sources import Pairs
from tests.data.conftest import WriteTar


@pytest.mark.parametrize(
    ("templates", "values", "captions"),
    [
        (("{txt}",), {"txt": "a fox"}, ["a fox"]),
        (("{txt}",), {"txt": " two\n\tlines  "}, ["two lines"]),
        (("{txt}",), {"txt": " \n"}, []),
        (("{txt}",), {}, []),
        (("{title}, {tags}",), {"title": "Fox", "tags": ["red", "", "wild"]}, ["Fox, red, wild"]),
        (("{title}, {tags}",), {"title": "Fox", "tags": []}, []),
        (("{title}, {tags}",), {"title": "Fox", "tags": None}, []),
        (("{title}", "{title}, {tags}"), {"title": "Fox"}, ["Fox"]),
        (("{title}", "{txt}"), {"title": "Fox", "txt": "Fox"}, ["Fox"]),
        (("{b}", "{a}", "{b}"), {"a": "1", "b": "2"}, ["2", "1"]),
        (("photo of {name} in {year}",), {"name": "Ada", "year": 1843}, ["photo of Ada in 1843"]),
        (("{captions.en.name}",), {"captions": {"en": {"name": "fox"}}}, ["fox"]),
        (("{captions.de.name}",), {"captions": {"en": {"name": "fox"}}}, []),
        (("{captions}",), {"captions": {"en": "fox"}}, []),
        (("{title.x}",), {"title": "Fox"}, []),
        (("{{{title}}}",), {"title": "Fox"}, ["{Fox}"]),
        (("{title}",), {"title": "{txt} {0}"}, ["{txt} {0}"]),
        (("{title}",), {"title": "half \ud83d of a pair\0"}, ["half ? of a pair"]),
        ((), {"txt": "a fox"}, []),
    ],
)
def test_templates(templates: tuple[str, ...], values: dict[str, Any], captions: list[str]) -> None:
    assert Captions(templates)(values) == captions


@pytest.mark.parametrize("template", ["{title", "title}", "{}", "a photo", "", "{title!r}", "{title:>9}", "{title} {}"])
def test_malformed_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"caption template .* is malformed"):
        Captions(("{txt}", template))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> Pairs:
    members = {
        "0.jpg": b"zero",
        "0.txt": b"text 0",
        "0.json": json.dumps({"title": "title 0", "class": "dog", "n": 3}).encode(),
        "1.jpg": b"one",
        "1.json": b'{"title": "title 1", "class": "unheard of", "n": 4}',
        "2.jpg": b"two",
        "2.txt": b"caf\xe9 \xff",
        "2.json": b"{broken",
        "3.jpg": b"three",
        "3.json": b"[1, 2]",
        "4.jpg": b"four",
        "4.json": b"[" * 100_000,
    }
    path = write_tar(tmp_path_factory.mktemp("pairs") / "x.tar", members)
    return Pairs(read_pairs(str(path)).index, Captions(("{txt}", "{title}")), "class", ("cat", "dog"))


def test_documents(pairs: Pairs) -> None:
    documents = [pairs.document(i, key(0, i)) for i in range(len(pairs))]
    assert [d.images for d in documents] == [(b"zero",), (b"one",), (b"two",), (b"three",), (b"four",)]
    assert documents[0].texts in (("text 0",), ("title 0",))
    assert [d.texts for d in documents[1:]] == [("title 1",), ("caf\ufffd \ufffd",), (), ()]
    assert [d.meta for d in documents] == [{"label": 1}, {}, {}, {}, {}]
    assert documents[0].id == pairs.index.name(0)


def test_one_of_the_captions_is_drawn_by_key(pairs: Pairs) -> None:
    drawn = [pairs.document(0, key(0, p)).texts[0] for p in range(300)]
    assert drawn == [pairs.document(0, key(0, p)).texts[0] for p in range(300)]
    counts = Counter(drawn)
    assert set(counts) == set(pairs.all_captions(0)) == {"text 0", "title 0"}
    assert 106 < counts["title 0"] < 194  # 150 plus or minus five standard deviations


def test_labels_that_are_numbers(pairs: Pairs) -> None:
    numbered = Pairs(pairs.index, pairs.captions, "n", ("3", "4"))
    assert [numbered.document(i, key(0, 0)).meta for i in range(3)] == [{"label": 0}, {"label": 1}, {}]
