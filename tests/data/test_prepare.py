"""`prepare` writes a folder that opens again, or nothing at all."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.sources import Pairs
from altsight.data.survey import percentiles
from tests.data.conftest import WriteShards, WriteTar


@pytest.fixture
def data(tmp_path: Path, write_shards: WriteShards) -> Path:
    return write_shards(tmp_path / "data", samples=10, per_shard=4)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(str(data), tmp_path / "out", ("{txt}", "{title}, {tags}"), "class", vocab_size=300)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_written_opens_again(config: PrepareConfig, data: Path) -> None:
    prepared = prepare(config)
    assert files(config.out) == ["dataset.json", "index.npy", "shards.jsonl", "tokenizer.json"]
    again = open_prepared(str(config.out))
    for found in (prepared, again):
        assert found.directory == config.out
        assert found.classes == ("ant", "cat", "dog")
        assert isinstance(found.source, Pairs)
        assert found.source.all_captions(4) == ["a picture of thing 4", "title 4, red, tag4"]
        assert found.source.document(4, key(0, 0)).meta == {"label": 2}
        assert isinstance(found.source.index.rows, np.memmap)
        assert [shard.path for shard in found.source.index.shards] == sorted(map(str, data.glob("*.tar")))
    assert again.hash() == prepared.hash()
    assert prepared.tokenizer is not None
    assert again.tokenizer is not None
    assert torch.equal(prepared.tokenizer.encode("a picture", 9), again.tokenizer.encode("a picture", 9))


def test_statistics_are_what_counting_by_hand_gives(config: PrepareConfig, data: Path) -> None:
    prepared = prepare(config)
    assert prepared.tokenizer is not None
    captions = [caption for i in range(10) for caption in prepared.source.texts(i)]
    lengths = sorted(len(caption) for caption in captions)
    tokens = [len(prepared.tokenizer.model.encode(c, add_special_tokens=False).ids) + 2 for c in captions]
    found = prepared.statistics
    assert (found["samples"], found["with_caption"], found["captions"], found["left_out"]) == (10, 10, 20, 0)
    assert found["caption_characters"]["p0"] == lengths[0]
    assert found["caption_characters"]["p50"] == (lengths[9] + lengths[10]) / 2
    assert found["caption_tokens"]["p100"] == max(tokens)
    with tarfile.open(data / "00000.tar") as tar:
        sizes = [512 + -(-member.size // 512) * 512 for member in tar]  # a header, and whole blocks
    assert found["sample_bytes"]["p0"] <= min(sum(sizes[i : i + 3]) for i in range(0, 12, 3))
    assert found["sample_bytes"]["p100"] >= max(sum(sizes[i : i + 3]) for i in range(0, 12, 3))
    assert json.loads((config.out / "dataset.json").read_text())["statistics"] == found
    assert list(prepared.source.parts().items()) == [("00000.tar", 4), ("00001.tar", 4), ("00002.tar", 2)]


def test_percentiles_of_nothing() -> None:
    assert percentiles([]) == {}
    assert percentiles([3]) == dict.fromkeys(("p0", "p1", "p5", "p50", "p95", "p99", "p100"), 3.0)


def test_hash_names_samples_and_captions_but_not_the_place(config: PrepareConfig, data: Path, tmp_path: Path) -> None:
    first = prepare(config).hash()
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    assert len(first) == 12
    assert prepare(replace(config, source=str(moved))).hash() == first
    assert prepare(replace(config, captions=("{txt}",))).hash() != first
    (moved / "00002.tar").unlink()
    assert prepare(replace(config, source=str(moved))).hash() != first


def test_a_known_tokenizer_is_taken_as_it_is(config: PrepareConfig, tmp_path: Path) -> None:
    first = prepare(config)
    known = shutil.copy(config.out / "tokenizer.json", tmp_path / "known.json")
    second = prepare(replace(config, out=tmp_path / "second", captions=("{title}",), tokenizer=str(known)))
    assert first.tokenizer is not None
    assert second.tokenizer is not None
    assert second.tokenizer.model.to_str() == first.tokenizer.model.to_str()


def test_images_only_leaves_the_text_aside(config: PrepareConfig) -> None:
    prepared = prepare(replace(config, images_only=True))
    assert files(config.out) == ["dataset.json", "index.npy", "shards.jsonl"]
    assert prepared.tokenizer is None
    assert prepared.source.document(0, key(0, 0)).texts == ()
    assert prepared.classes == ("ant", "cat", "dog")
    assert prepared.statistics["captions"] == 0


def test_read_pairs_writes_nothing(data: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    found = read_pairs(str(data), ("{title}",), "class")
    assert (len(found), found.classes) == (10, ("ant", "cat", "dog"))
    assert found.all_captions(3) == ["title 3"]
    assert read_pairs(str(data)).classes == ()
    assert files(tmp_path) == before


def test_a_prepared_folder_is_replaced(config: PrepareConfig, tmp_path: Path) -> None:
    first = prepare(config).hash()
    second = prepare(replace(config, captions=("{title}",)))
    assert second.hash() != first
    assert open_prepared(config.out).source.texts(2) == ["title 2"]
    assert files(tmp_path / "out") == ["dataset.json", "index.npy", "shards.jsonl", "tokenizer.json"]
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out"}


def test_empty_folders_and_missing_parents_are_fine(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(config)
    deep = replace(config, out=tmp_path / "a" / "b" / "c")
    assert open_prepared(prepare(deep).directory).hash() == open_prepared(config.out).hash()


@pytest.mark.parametrize("keep", ["notes.txt", "dataset.json and notes.txt", "a file"])
def test_other_peoples_files_are_never_replaced(config: PrepareConfig, keep: str) -> None:
    if keep == "a file":
        config.out.write_text("mine")
    else:
        config.out.mkdir()
        for name in keep.split(" and "):
            (config.out / name).write_text("{}")
    before = files(config.out.parent)
    with pytest.raises(UserError, match=r"out' (is a file|holds other files).*--out a folder that does not exist"):
        prepare(config)
    assert files(config.out.parent) == before


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("stage", ["indexing shards", "reading captions", "counting tokens"])
@pytest.mark.parametrize("replaces", [False, True])
def test_an_interruption_leaves_nothing_but_what_is_known_of_whole_shards(
    config: PrepareConfig, tmp_path: Path, stage: str, replaces: bool
) -> None:
    if replaces:
        prepare(config)
    nested = replace(config, out=config.out if replaces else tmp_path / "new" / "nested")
    before = files(tmp_path)
    held = open_prepared(config.out).hash() if replaces else ""
    seen = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if what == stage:
            raise Stop

    with pytest.raises(Stop):
        prepare(replace(nested, captions=("{title}",)), stop)
    assert seen[-1] == stage
    work = tmp_path / (".out.parts" if replaces else ".nested.parts")
    assert [name for name in files(tmp_path) if not name.startswith(work.name)] == before
    if replaces:
        assert open_prepared(config.out).hash() == held
    known = len(list(work.glob("*.json")))
    assert known == (1 if stage == "indexing shards" else 3)
    again: list[int] = []
    prepare(replace(nested, captions=("{title}",)), lambda what, done, total: again.append(done))
    assert again[0] == (known + 1 if known < 3 else 10)
    assert not work.exists()


def test_a_failure_of_the_last_step_puts_the_old_folder_back(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = prepare(config).hash()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"out' cannot be written \(No space left on device\)"):
        prepare(replace(config, captions=("{title}",)))
    assert open_prepared(config.out).hash() == held
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out", ".out.parts"}


def test_progress_counts_to_the_end(config: PrepareConfig) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(config, lambda what, done, total: seen.append((what, done, total)))
    assert seen == [
        *(("indexing shards", n, 3) for n in (1, 2, 3)),
        ("reading captions", 10, 10),
        ("counting tokens", 10, 10),
    ]


def test_data_that_cannot_be_prepared(config: PrepareConfig, tmp_path: Path, write_tar: WriteTar) -> None:
    (tmp_path / "empty").mkdir()
    texts = write_tar(tmp_path / "texts.tar", {"0.txt": b"a", "1.txt": b"b"})
    images = write_tar(tmp_path / "images.tar", {"0.jpg": b"a", "1.jpg": b"b"})
    half = tmp_path / "half.tar"
    half.write_bytes(images.read_bytes()[:700])
    cases = [
        (replace(config, source=str(tmp_path / "gone")), r"gone' does not exist: give"),
        (replace(config, source=str(tmp_path / "empty")), r"empty' holds no shard .*: give"),
        (replace(config, source=str(half)), r"half\.tar' is truncated .*: download it again"),
        (replace(config, source=str(texts)), r"texts\.tar' hold no image: "),
        (replace(config, source=str(images)), r"none of the 2 images in .* has a caption: give --captions"),
        (replace(config, captions=("{alt}",)), r"none of the 10 images .*\(class, tags, title, txt\)"),
        (replace(config, captions=("{title",)), r"'\{title' is malformed"),
        (replace(config, label="category"), r"label field 'category': give --label .*\(class, tags, title, txt\)"),
        (replace(config, tokenizer=str(tmp_path / "empty")), r"tokenizer '.*' cannot be loaded"),
        (replace(config, vocab_size=10), r"vocabulary of 10 is too small"),
    ]
    before = files(tmp_path)
    for case, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            prepare(case)
        assert "\n" not in str(caught.value)
        assert files(tmp_path) == before


def test_shards_that_moved_or_changed(config: PrepareConfig, data: Path) -> None:
    prepare(config)
    shard = data / "00001.tar"
    held = shard.read_bytes()
    shard.write_bytes(held + b"\0" * 512)
    with pytest.raises(UserError, match=r"00001\.tar' has changed from .* bytes: run `altsight prepare` again"):
        open_prepared(config.out)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001\.tar' is gone: put it back, or run `altsight prepare` again"):
        open_prepared(config.out)
    shard.write_bytes(held)
    assert len(open_prepared(config.out).source) == 10


def test_folders_that_were_not_prepared(config: PrepareConfig, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone' does not exist: run `altsight prepare SOURCE --out .*gone` first"):
        open_prepared(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data' is no prepared data set: run `altsight prepare SOURCE --out"):
        open_prepared(data)


def damage(prepared: Prepared, name: str, content: bytes) -> None:
    (prepared.directory / name).write_bytes(content)


def test_damaged_folders(config: PrepareConfig, tmp_path: Path) -> None:
    other_index = tmp_path / "other.npy"
    np.save(other_index, np.zeros(3))
    cases = [
        ("index.npy", b"", r"index\.npy' cannot be read .*: run `altsight prepare` again"),
        ("index.npy", other_index.read_bytes(), r"index\.npy' does not belong"),
        ("dataset.json", b"{", r"dataset\.json' is no JSON"),
        ("dataset.json", b'{"version": 99}', r"dataset\.json' was written by another version"),
        ("tokenizer.json", b"{}", r"tokenizer\.json' cannot be loaded"),
    ]
    for name, content, words in cases:
        damage(prepare(config), name, content)
        with pytest.raises(UserError, match=words):
            open_prepared(config.out)
