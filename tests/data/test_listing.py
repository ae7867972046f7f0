"""Lists of files with labels, and files of class names."""

from __future__ import annotations

from pathlib import Path

import pytest

from altsight.core.errors import UserError
from altsight.data.listing import Item, check_labels, list_items, read_classes


def is_clip(path: Path) -> bool:
    return path.suffix == ".clip"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/b.clip", "cat/a.clip", "dog/c.clip", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_layouts(folder: Path) -> None:
    expected = [Item(folder / f"cat/{n}.clip", "cat") for n in "ab"] + [Item(folder / "dog/c.clip", "dog")]
    assert list_items(folder, is_clip, "clip") == expected
    assert list_items(folder / "cat", is_clip, "clip") == [Item(folder / f"cat/{n}.clip") for n in "ab"]
    assert list_items(folder / "dog/c.clip", is_clip, "clip") == [Item(folder / "dog/c.clip")]
    (folder / "list.csv").write_text("path,label\ncat/a.clip,cat\ndog/c.clip,\n")
    (folder / "list.jsonl").write_text('{"path": "cat/a.clip", "label": "cat"}\n{"path": "dog/c.clip"}\n')
    for name in ("list.csv", "list.jsonl"):
        listed = [Item(folder / "cat/a.clip", "cat"), Item(folder / "dog/c.clip")]
        assert list_items(folder / name, is_clip, "clip") == listed


def test_what_cannot_be_listed(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "gone.csv").write_text("path,label\ncat/z.clip,cat\n")
    (folder / "columns.csv").write_text("file,label\ncat/a.clip,cat\n")
    (folder / "bad.jsonl").write_text("{\n")
    for name in ("missing", "empty", "gone.csv", "columns.csv", "bad.jsonl", "dog/notes.txt"):
        with pytest.raises(UserError, match=Path(name).name) as error:
            list_items(folder / name, is_clip, "clip")
        assert "\n" not in str(error.value)


def test_class_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("RCC | renal cell carcinoma\n\nstar\n")
    assert read_classes(tmp_path / "names.txt") == {"RCC": ("RCC", "renal cell carcinoma"), "star": ("star",)}
    (tmp_path / "names.json").write_text('{"RCC": ["renal cell carcinoma", "renal cancer"], "s": "star"}')
    assert read_classes(tmp_path / "names.json") == {"RCC": ("renal cell carcinoma", "renal cancer"), "s": ("star",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "cat\ndog\ncat\n", "'cat' twice"),
        ("a.txt", "\n", "names no class"),
        ("a.json", '{"cat": []}', "has no name"),
        ("a.json", '{"cat": "a cat", "cat": "the cat"}', "'cat' twice"),
        ("a.json", '["cat"]', "must hold"),
        ("a.json", "{", "no JSON"),
    ],
)
def test_wrong_class_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / name)


def test_missing_class_file(tmp_path: Path) -> None:
    for name in ("none.txt", "none.json"):
        with pytest.raises(UserError, match=name):
            read_classes(tmp_path / name)


def test_labels_and_folders_must_fit(folder: Path) -> None:
    items = list_items(folder, is_clip, "clip")
    check_labels(items, ["dog", "cat"], folder)
    with pytest.raises(UserError, match="'dog', which is none of the classes"):
        check_labels(items, ["cat", "god"], folder)
    with pytest.raises(UserError, match="'bird' has no folder"):
        check_labels(items, ["cat", "dog", "bird"], folder)
