"""The report before a run counts what is there."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from altsight.core.errors import UserError
from altsight.data.check import Report, check, show
from altsight.data.decode import decode
from altsight.data.measure import difference_hash
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.prepared import Prepared
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


def test_images(report: Report, prepared: Prepared) -> None:
    images = report.images
    assert images.broken == 1
    assert images.broken_names[0].startswith(f"{prepared.source.name(3)} (no image, it begins with b'<html>")
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
    assert captions.frequent == {"the same old words": 12}


def test_shards_classes_and_steps(report: Report) -> None:
    assert report.shards == {"a.tar": 12, "b.tar": 8}
    assert report.classes == {"cat": 15, "dog": 5}
    assert (report.samples, report.batch, report.steps, report.samples_seen) == (20, 6, 16, 96)
    assert report.passes == pytest.approx(4.8)


def test_warnings_are_plain_words(report: Report) -> None:
    assert report.warnings == (
        "5.0% of the images are broken; other samples take their place.",
        "10.5% of the images are copies of another one, byte for byte.",
        "5.3% of the images have a side shorter than 64 pixels.",
        "5.3% of the images are more than 3 times as long as wide; crops miss most of them.",
        "5.3% of the captions take more than 20 tokens and are cut.",
        "63.2% of the captions stand on more than 10 images and say little of each.",
    )


def test_workers_find_the_same(report: Report, prepared: Prepared) -> None:
    seen = []
    again = check(prepared, 6, 100, workers=2, context=20, progress=lambda *at: seen.append(at))
    assert again == report
    assert seen == [("decoding images", 20, 20)]


def test_the_report_is_json_and_text(report: Report) -> None:
    assert json.loads(json.dumps(asdict(report)))["captions"]["frequent"] == {"the same old words": 12}
    console = Console(file=io.StringIO(), width=100)
    show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("20 samples in 2 shards", "a.tar", "the same old words", "2 classes", "shorter side", "63.2%"):
        assert words in text
    assert "broken image" in text
    assert text.strip().endswith("96 samples seen = 16 steps of batch 6 = 4.80 passes over the data")


def test_many_shards_and_classes_are_summed_up(report: Report) -> None:
    many = {f"{i:05d}.tar": 10 for i in range(30)}
    console = Console(file=io.StringIO(), width=100)
    show(replace(report, shards=many, classes={f"class [{i}]": i for i in range(30)}), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ["25", "more", "250"] in [line.split() for line in text.splitlines()]
    assert "class [29]" in text
    assert "class [3]" not in text


def test_data_without_text(tmp_path: Path, write_shards: WriteShards) -> None:
    prepared = Prepared(tmp_path, read_pairs(str(write_shards(tmp_path / "data")), captions=()))
    report = check(prepared, 2, 10)
    assert (report.captions.count, report.captions.frequent, report.images.broken) == (0, {}, 0)
    show(report, Console(file=io.StringIO()))
    assert not any("caption" in warning for warning in report.warnings)


def test_data_that_cannot_be_trained_on(tmp_path: Path, prepared: Prepared, write_shards: WriteShards) -> None:
    with pytest.raises(UserError, match=r"batch of 21 is larger than the data set '.*' of 20 samples"):
        check(prepared, 21, 100)
    with pytest.raises(UserError, match="run of 3 samples is shorter than one batch of 4"):
        check(prepared, 4, 3)
    broken = write_shards(tmp_path / "data", 3, 3, {i: b"no image" for i in range(3)})
    with pytest.raises(UserError, match=r"none of the 3 samples .* \(broken image: .*00000\.tar#0 .*\): download"):
        check(prepare(PrepareConfig(str(broken), tmp_path / "out", vocab_size=300)), 1, 10)


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
