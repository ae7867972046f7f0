"""Class files, subsets of classes, and prompt templates: what they mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from altsight.core.errors import UserError
from altsight.evals.classes import check_named, class_names, subset
from altsight.evals.templates import templates


def write(path: Path, content: object) -> str:
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_one_name_a_line_in_the_order_of_the_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "names.txt", "great tit\n\ntawny owl\n")
    assert class_names(file, ["n02", "n01", "n02", ""]) == {"n01": "great tit", "n02": "tawny owl"}


def test_numbered_folders_count_as_numbers_not_as_text(tmp_path: Path) -> None:
    file = write(tmp_path / "names.txt", "\n".join(f"thing {i}" for i in range(12)))
    names = class_names(file, [str(i) for i in (0, 10, 2, 11)])
    assert names["10"] == "thing 10" and names["2"] == "thing 2" and list(names)[2] == "2"
    assert class_names(file, ["003", "010"])["010"] == "thing 10"


def test_a_json_object_names_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "names.json", {"b": "bee", "a": "T-shirt"})
    assert class_names(file, ["a"]) == {"b": "bee", "a": "T-shirt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", "owl\nOwl", "names two labels 'Owl' \\('a' and 'b'\\)"),
        ("names.json", {"a": "owl", "b": "owl"}, "names two labels 'owl'"),
        ("names.txt", "owl", "holds 1 names for 2 labels"),
        ("names.json", {"a": "owl", "b": " "}, "'b' an empty name"),
        ("names.json", "{", "is no JSON"),
        ("names.txt", "Eule\nM\u00e4use".encode("latin-1"), "is no UTF-8 text"),
        ("names.json", "3", "must hold a JSON object or list"),
    ],
)
def test_what_is_no_class_file_is_refused(name: str, content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        class_names(write(tmp_path / name, content), ["a", "b"])


def test_missing_files_and_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.txt.*cannot be read"):
        class_names(str(tmp_path / "no.txt"), ["a"])
    with pytest.raises(UserError, match=r"'names\.json' has no name for the label 'c' and 1 more"):
        check_named({"a": "owl"}, ["a", "d", "c", ""], "names.json")


def test_a_subset_lists_labels_or_names_however_they_are_written(tmp_path: Path) -> None:
    names = {"alarm_clock": "alarm clock", "bills_money": "Bills (money)", "desk_lamp": "desk lamp"}
    file = write(tmp_path / "objectnet_to_imagenet_1k.json", {"Bills (money)": "x", "Alarm clock": "analog clock"})
    assert list(subset(file, names)) == ["alarm_clock", "bills_money"]
    file = write(tmp_path / "some.txt", "desk_lamp\n")
    assert subset(file, names) == {"desk_lamp": "desk lamp"}
    with pytest.raises(UserError, match="lists 'unicorn', which is the label or name of no class"):
        subset(write(tmp_path / "bad.txt", "desk lamp\nunicorn"), names)


def test_imagenet_and_its_masked_subsets() -> None:
    pytest.importorskip("open_clip")
    names = class_names("imagenet", ["n01440764", "n15075141"])
    assert len(names) == 1000 and names["n01440764"] == "tench" and names["n15075141"] == "toilet paper"
    assert class_names("imagenet", ["0", "999"])["999"] == "toilet paper"
    for name in ("imagenet-a", "imagenet-r"):
        chosen = subset(name, names)
        assert len(chosen) == 200 and list(chosen) == sorted(chosen)


def test_named_templates_have_the_published_numbers() -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("clip_benchmark")
    numbers = {"imagenet": 80, "imagenet7": 7, "cifar10": 18, "food101": 1, "fgvc_aircraft": 2, "caltech101": 34}
    for name, number in numbers.items():
        found = templates(name)
        assert len(found) == number and all(prompt.count("{}") == 1 for prompt in found)
    assert templates("imagenet7")[0] == "itap of a {}."


def test_templates_of_a_file(tmp_path: Path) -> None:
    assert templates(write(tmp_path / "t.txt", "a {}\n\nthe {c}!\n")) == ("a {}", "the {}!")
    with pytest.raises(UserError, match=r"t\.txt': the prompt 'a photo' needs one \{\}"):
        templates(write(tmp_path / "t.txt", "a photo\n"))
    with pytest.raises(UserError, match=r"no file or set of templates 'imagnet'\. Did you mean 'imagenet'"):
        templates("imagnet")
    with pytest.raises(UserError, match="no UTF-8 text"):
        templates(write(tmp_path / "l.txt", "un \u00e9l\u00e9phant {}".encode("latin-1")))
