"""The report before a run counts what is there."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import altsight_samples
import pytest
import torch
from rich.console import Console

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document
from altsight.data.check import Report, check
from altsight.data.decode import decode
from altsight.data.facts import Fault, faults
from altsight.data.measure import Broken, difference_hash
from altsight.data.mix import MixConfig, mix
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.prepared import Prepared
from altsight.data.show import show
from altsight.data.sources import Interleaves, Pairs
from tests.data.conftest import Picture, WriteShards, WriteTar


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, picture: Picture, write_tar: WriteTar) -> Prepared:
    """20 samples in two shards, among them one broken image, two copies, one look-alike, one without a caption."""
    folder = tmp_path_factory.mktemp("check")
    images = {i: picture(i, (80, 70)) for i in range(20)}
    images[3] = b"<html>gone</html>"
    images[5] = images[4]
    images[6] = images[4]
    images[8] = picture(7, (80, 70), "JPEG", quality=95)
    images[10] = picture(10, (400, 64))
    images[11] = picture(11, (30, 40))
    texts = {i: b"the same old words" for i in range(12)} | {i: f"words {i}".encode() for i in range(12, 20)}
    texts[13] = b"long " * 30
    del texts[14]
    for shard, samples in (("a.tar", range(12)), ("b.tar", range(12, 20))):
        members: dict[str, bytes] = {}
        for i in samples:
            members[f"{i}.png"] = images[i]
            members |= {f"{i}.txt": texts[i]} if i in texts else {}
            members[f"{i}.json"] = json.dumps({"class": "cat" if i < 15 else "dog"}).encode()
        write_tar(folder / "data" / shard, members)
    return prepare(PrepareConfig(str(folder / "data"), folder / "out", label="class", vocab_size=300))


@pytest.fixture(scope="module")
def report(prepared: Prepared) -> Report:
    return check(prepared, batch=6, samples=100, context=20)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The embedded documents."""
    out = tmp_path_factory.mktemp("documents") / "out"
    return prepare(PrepareConfig(str(altsight_samples.documents()), out, vocab_size=500))


def shown(report: Report, width: int = 100) -> str:
    """Return what a terminal of `width` columns shows of a report."""
    console = Console(file=io.StringIO(), width=width)
    show(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_images(report: Report, prepared: Prepared) -> None:
    images = report.images
    assert (images.count, images.broken, images.unusable) == (19, 1, 1)
    assert images.faults == (Fault(1, "no image, it begins with b'<html…", prepared.source.name(3)),)
    assert isinstance(prepared.source, Pairs)
    sizes = [len(prepared.source.image(i)) / 1000 for i in range(20) if i != 3]
    assert (images.kilobytes["p0"], images.kilobytes["p100"]) == (round(min(sizes), 3), round(max(sizes), 3))
    assert (images.copies, images.lookalikes) == (2, 1)
    assert images.shorter_side["p0"] == 30
    assert images.shorter_side["p50"] == 70
    assert images.aspect_ratio["p100"] == 400 / 64
    assert (images.small, images.long) == (1 / 19, 1 / 19)


def test_captions(report: Report, prepared: Prepared) -> None:
    captions = report.captions
    assert (captions.count, captions.missing) == (19, 1)
    assert captions.characters["p100"] == len("long " * 30) - 1
    assert prepared.tokenizer is not None
    assert captions.tokens["p100"] == prepared.tokenizer.count("long " * 30)
    assert captions.truncated == 1 / 19
    assert captions.repeated == 11 / 19
    assert captions.shared == 12 / 19
    assert captions.per_sample["p100"] == 1
    assert captions.frequent == {"the same old words": 12}


def test_shards_classes_and_steps(report: Report) -> None:
    assert report.shards == {"a.tar": 12, "b.tar": 8}
    assert report.classes == {"cat": 15, "dog": 5}
    assert (report.samples, report.batch, report.steps, report.samples_seen) == (20, 6, 16, 96)
    assert report.passes == pytest.approx(4.8)


def test_warnings_are_plain_words(report: Report) -> None:
    assert report.warnings == (
        "5.0% of the samples have no usable image; others take their place.",
        "10.5% of the images are copies of another one, byte for byte.",
        "5.3% of the images have a side shorter than 64 pixels.",
        "5.3% of the images are more than 3 times as long as wide; crops miss most of them.",
        "5.3% of the captions take more than 20 tokens and are cut.",
        "63.2% of the captions are shared by more than 10 samples and say little of each.",
        "1 of the 2 classes has fewer than 10 samples.",
        "A pass over the data is only 3.3 steps: a batch of 6 is large for them.",
    )


def test_workers_find_the_same(report: Report, prepared: Prepared) -> None:
    seen = []
    again = check(prepared, 6, 100, workers=2, context=20, progress=lambda *at: seen.append(at))
    assert again == report
    assert seen == [("decoding images", 20, 20)]


def test_the_report_is_json_and_text(report: Report) -> None:
    assert json.loads(json.dumps(asdict(report)))["captions"]["frequent"] == {"the same old words": 12}
    text = shown(report)
    for words in ("a.tar", "the same old words", "2 classes", "shorter side", "63.2%", "begins with b'<html…"):
        assert words in text
    assert "each sample" not in text, "one image and one caption each are not worth a row"
    assert text.startswith("20 samples in 2 shards of ")
    assert text.endswith("\nA run of 96 samples: 16 steps of batch 6, 4.80 passes over the data.\n")


def test_the_report_fits_the_terminal(report: Report) -> None:
    assert max(map(len, shown(report, 80).splitlines())) <= 80


def test_many_shards_and_classes_are_summed_up(report: Report) -> None:
    many = {f"{i:05d}.tar": 10 for i in range(30)}
    text = shown(replace(report, shards=many, classes={f"class [{i}]": i for i in range(30)}))
    assert any("25 more    250" in line for line in text.splitlines())
    assert "class [29]" in text
    assert "class [3]" not in text


def test_captions_cannot_steer_the_terminal(report: Report) -> None:
    hostile = {"\x1b]0;title\x07 \ud800 [red]words[/]": 3}
    text = shown(replace(report, captions=replace(report.captions, frequent=hostile)))
    assert "]0;title" in text and "[red]words[/]" in text
    assert not {"\x1b", "\x07", "\ud800"} & set(text)


def test_the_same_fault_is_counted_once() -> None:
    reasons = [
        "there is no image 'a.jpg' in '/x'",
        "image file is truncated (12 bytes not processed)",
        "no image, it begins with b'<html><head>'",
        "image file is truncated (1,234 bytes not processed)",
        "no image, it begins with b'<html><body>'",
        "image file is truncated (7 bytes not processed)",
        "no image, it begins with b'\\x00\\x00\\x00\\x00\\x00\\x00'",
        "no image, it begins with b''",
    ]
    assert faults([Broken(f"x.tar#{i}", reason) for i, reason in enumerate(reasons)]) == (
        Fault(3, "image file is truncated (… bytes not processed)", "x.tar#1"),
        Fault(2, "no image, it begins with b'<html…", "x.tar#2"),
        Fault(1, "there is no image … in …", "x.tar#0"),
        Fault(1, "no image, it begins with b'\\x00\\x00\\x00\\x00\\x00…", "x.tar#6"),
        Fault(1, "no image, it begins with b'…", "x.tar#7"),
    )


def test_many_faults_are_summed_up(report: Report) -> None:
    many = tuple(Fault(10 - i, f"fault {chr(97 + i)}", f"x.tar#{i}") for i in range(8))
    text = shown(replace(report, images=replace(report.images, faults=many)))
    assert "10  fault a" in text and "first at x.tar#4" in text
    assert "12  for other reasons" in text and "fault f" not in text


def test_a_part_of_the_data_is_said_to_be_one(tmp_path: Path, write_shards: WriteShards) -> None:
    found = Prepared(tmp_path, read_pairs(str(write_shards(tmp_path / "data", 300, 300)), label="class"))
    part = check(found, 2, 1000, most=128)
    assert (part.samples, part.looked_at, part.images.count, sum(part.classes.values())) == (300, 128, 128, 128)
    assert "300 samples in 1 shard" in shown(part) and "Counted on 128 of them" in shown(part)
    assert "Counted on" not in shown(check(found, 2, 1000))


def test_documents(documents: Prepared) -> None:
    source = documents.source
    assert isinstance(source, Interleaves) and documents.tokenizer is not None
    report = check(documents, 8, 1000)
    texts = [source.texts(i) for i in range(len(source))]
    lengths = [sum(map(len, words)) for words in texts]
    tokens = [documents.tokenizer.count(" ".join(words)) for words in texts]
    assert (report.kind, report.captions.count) == ("documents", sum(map(len, texts)))
    assert (report.captions.characters["p0"], report.captions.characters["p100"]) == (min(lengths), max(lengths))
    assert (report.captions.tokens["p0"], report.captions.tokens["p100"]) == (min(tokens), max(tokens))
    assert report.captions.truncated == sum(count > 77 for count in tokens) / len(texts)
    assert report.images.per_sample["p100"] == source.sampling.max_images
    text = shown(report)
    for words in ("133 documents in 1 shard", "images, each document", "texts, each document", "documents without any"):
        assert words in text
    assert "of the documents take more than 77 tokens and are cut" in text
    as_pairs = check(replace(documents, source=replace(source, as_pairs=True)), 8, 1000)
    assert (as_pairs.kind, as_pairs.images.count) == ("pairs", 133)


def test_documents_without_an_image(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "images").mkdir()
    for name, data in {"a.png": picture(1), "b.png": picture(2), "c.png": b"no image"}.items():
        (tmp_path / "images" / name).write_bytes(data)
    named = (["a.png", "b.png"], ["a.png", "c.png"], ["c.png"], ["gone.png"])
    lines = [
        {"text_list": names, "image_info": [{"image_name": n, "matched_text_index": i} for i, n in enumerate(names)]}
        for names in named
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = check(prepare(PrepareConfig(str(tmp_path / "d.jsonl"), tmp_path / "out", vocab_size=300)), 1, 10)
    assert (report.images.count, report.images.broken, report.images.unusable) == (3, 3, 2)
    assert [fault.count for fault in report.images.faults] == [2, 1]
    assert report.warnings[:2] == (
        "50.0% of the samples have no usable image; others take their place.",
        "50.0% of the images are broken.",
    )


def test_a_mixture(documents: Prepared, prepared: Prepared, tmp_path: Path) -> None:
    config = MixConfig((prepared.directory, documents.directory), tmp_path / "mix", (3, 1), vocab_size=500)
    report = check(mix(config), 8, 1000)
    sources = list(report.shards)
    assert [Path(tmp_path / "mix" / name).resolve() for name in sources] == [prepared.directory, documents.directory]
    assert (report.kind, list(report.shards.values())) == ("mixture", [20, 133])
    assert report.weights == {sources[0]: 0.75, sources[1]: 0.25}
    assert report.classes == {"cat": 15, "dog": 5}
    text = shown(report, 200)
    assert "153 samples in 2 sources" in text
    assert f"{0.75 * 1000 / 20:.2f}" in text and f"{0.25 * 1000 / 133:.2f}" in text


@dataclass(frozen=True)
class Remote(Pairs):
    """Pairs that claim to lie far away, and that wait until two of them are read at once."""

    is_remote = True
    meeting: ClassVar[threading.Barrier] = threading.Barrier(2)

    def document(self, i: int, at: Key) -> Document:
        self.meeting.wait(timeout=30)
        return super().document(i, at)


def test_remote_data_are_read_at_once_and_found_the_same(prepared: Prepared, report: Report) -> None:
    assert isinstance(prepared.source, Pairs)
    remote = replace(prepared, source=Remote(**{f.name: getattr(prepared.source, f.name) for f in fields(Pairs)}))
    found = check(remote, 6, 100, context=20)
    assert found == replace(report, is_remote=True)
    assert "read over the network" in shown(found) and "network" not in shown(report)


def test_data_without_text(tmp_path: Path, write_shards: WriteShards) -> None:
    prepared = Prepared(tmp_path, read_pairs(str(write_shards(tmp_path / "data")), captions=()))
    report = check(prepared, 2, 10)
    assert (report.captions.count, report.captions.frequent, report.images.broken) == (0, {}, 0)
    assert shown(report).count("No text") == 1
    assert "caption" not in shown(report)


def test_data_that_cannot_be_trained_on(tmp_path: Path, prepared: Prepared, write_shards: WriteShards) -> None:
    with pytest.raises(UserError, match=r"batch of 21 is larger than the data set '.*' of 20 samples"):
        check(prepared, 21, 100)
    with pytest.raises(UserError, match="run of 3 samples is shorter than one batch of 4"):
        check(prepared, 4, 3)
    broken = write_shards(tmp_path / "data", 3, 3, {i: b"no image" for i in range(3)})
    with pytest.raises(
        UserError, match=r"none of the 3 samples .* \(broken image: no image, .*, first at .*00000\.tar#0\): download"
    ):
        check(prepare(PrepareConfig(str(broken), tmp_path / "out", vocab_size=300)), 1, 10)


def test_images_that_documents_name_and_nobody_has_are_counted(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    info = [{"image_name": f"{n}.png", "matched_text_index": n} for n in range(3)]
    document = json.dumps({"text_list": ["a", "b", "c"], "image_info": info})
    (tmp_path / "d.jsonl").write_text(f"{document}\n{document}\n")
    prepared = prepare(PrepareConfig(str(tmp_path / "d.jsonl"), tmp_path / "out", vocab_size=300))
    images = check(prepared, 1, 10).images
    assert (images.count, images.broken, images.unusable) == (2, 4, 0)
    assert sum(fault.count for fault in images.faults) == 4
    assert "there is no image" in images.faults[0].reason


def test_no_sample_has_both_an_image_and_a_caption(tmp_path: Path, picture: Picture, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": picture(), "1.png": b"no image", "1.txt": b"words"})
    with pytest.raises(UserError, match="none of the 2 samples"):
        check(prepare(PrepareConfig(str(tmp_path / "x.tar"), tmp_path / "out", vocab_size=300)), 1, 10)


def test_a_shard_that_vanishes_is_named(tmp_path: Path, write_shards: WriteShards) -> None:
    found = Prepared(tmp_path, read_pairs(str(write_shards(tmp_path / "data"))))
    (tmp_path / "data" / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar' cannot be read") as caught:
        check(found, 2, 10, workers=1)
    assert "\n" not in str(caught.value)


def test_difference_hash(picture: Picture) -> None:
    image = decode(picture(1, (90, 80)))
    brighter = (image.float() * 0.9 + 20).to(torch.uint8)
    smaller = decode(picture(1, (45, 40)))
    other = decode(picture(2, (90, 80)))

    def distance(a: torch.Tensor, b: torch.Tensor) -> int:
        return (difference_hash(a) ^ difference_hash(b)).bit_count()

    assert distance(image, brighter) <= 4
    assert distance(image, smaller) <= 6
    assert distance(image, other) > 12
    ramp = torch.arange(90, dtype=torch.uint8).expand(3, 80, 90)
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp.flip(-1)) == 0
