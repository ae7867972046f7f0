"""The embedded sample data: complete, licensed, small, and split without leaks."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import altsight_samples as samples
import numpy as np
import pytest
from PIL import Image

MEGABYTE = 1_000_000
NEAR_DUPLICATE = 8.0
RECOLOURED = 0.99
SETS = ("clipart", "emoji")
LICENSES = {
    "clipart": {"public-domain"},
    "emoji": {"CC-BY-SA-4.0", "Apache-2.0", "MIT"},
    "documents": {"BSD-3-Clause", "CC-BY-SA-3.0"},
}
SHARES = {
    "clipart": {"train": 0.8, "val": 0.1, "test": 0.1},
    "emoji": {"train": 0.6, "val": 0.2, "test": 0.2},
    "documents": {"train": 0.8, "val": 0.1, "test": 0.1},
}


@dataclass(frozen=True)
class Sample:
    """One sample as a reader of the shards sees it."""

    pixels: np.ndarray
    text: str
    fields: dict[str, Any]


@cache
def read(name: str, split: str) -> list[Sample]:
    """All samples of a split; fails on a sample that misses a member."""
    found = []
    for shard in sorted(samples.path(name, split).glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(shard) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                data = archive.extractfile(member)
                assert data is not None, f"{member.name} is not a file."
                parts[key][extension] = data.read()
        for key, part in parts.items():
            assert set(part) == {"webp", "txt", "json"}, f"{shard.name}: {key} has {sorted(part)}."
            fields = json.loads(part["json"])
            assert fields["key"] == key
            with Image.open(io.BytesIO(part["webp"])) as image:
                found.append(Sample(np.asarray(image.convert("RGB")), part["txt"].decode(), fields))
    return found


@cache
def read_documents() -> list[dict[str, Any]]:
    with (samples.documents() / "documents.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def thumbnails(name: str, split: str) -> np.ndarray:
    """32 x 32 colour thumbnails of a split, one flat row each."""
    pictures = (
        Image.fromarray(sample.pixels).resize((32, 32), Image.Resampling.BILINEAR) for sample in read(name, split)
    )
    return np.stack([np.asarray(picture, np.float32).ravel() for picture in pictures])


def closest(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest root mean square difference between a row of `a` and a row of `b`, of 255."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return float(np.sqrt(max(squares.min(), 0) / a.shape[1]))


def test_the_distribution_is_at_most_40_megabytes() -> None:
    total = sum(file.stat().st_size for file in samples.ROOT.parent.rglob("*") if file.is_file())
    assert total <= 40 * MEGABYTE


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", samples.SPLITS)
def test_every_sample_has_a_picture_a_text_a_label_a_licence_and_a_source(name: str, split: str) -> None:
    for sample in read(name, split):
        fields = sample.fields
        assert sample.text.strip()
        assert fields["label"]
        assert fields["source"]
        assert fields["license"] in LICENSES[name]
        assert sample.pixels.shape == (fields["height"], fields["width"], 3)
        assert sample.pixels.min() < 250, f"{fields['source']} is blank."


@pytest.mark.parametrize("name", SETS)
def test_splits_have_their_shares(name: str) -> None:
    counts = {split: len(read(name, split)) for split in samples.SPLITS}
    for split, share in SHARES[name].items():
        assert counts[split] / sum(counts.values()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", SETS)
def test_no_content_is_in_two_splits(name: str) -> None:
    hashes = {
        split: {hashlib.sha256(sample.pixels.tobytes()).digest() for sample in read(name, split)}
        for split in samples.SPLITS
    }
    assert all(hashes[a].isdisjoint(hashes[b]) for a, b in combinations(samples.SPLITS, 2))


@pytest.mark.parametrize("name", SETS)
def test_no_near_duplicates_straddle_a_split(name: str) -> None:
    rows = {split: thumbnails(name, split) for split in samples.SPLITS}
    for a, b in combinations(samples.SPLITS, 2):
        assert closest(rows[a], rows[b]) >= NEAR_DUPLICATE, f"{a} and {b} share a drawing."


@pytest.mark.parametrize("name", SETS)
def test_no_recoloured_drawing_straddles_a_split(name: str) -> None:
    """Light and dark swapped or scaled leave the correlation of the grey thumbnails at plus or minus one."""
    rows = {}
    for split in samples.SPLITS:
        grey = thumbnails(name, split).reshape(-1, 32 * 32, 3).mean(-1)
        centred = grey - grey.mean(1, keepdims=True)
        rows[split] = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for a, b in combinations(samples.SPLITS, 2):
        assert np.abs(rows[a] @ rows[b].T).max() <= RECOLOURED, f"{a} and {b} share a drawing."


def test_clip_art_is_many_shards_of_noisy_pairs() -> None:
    assert len(list(samples.path("clipart", "train").glob("*.tar"))) > 1
    everything = [sample for split in samples.SPLITS for sample in read("clipart", split)]
    assert all(sample.fields["label"] == sample.fields["category"].split("/")[0] for sample in everything)
    assert (
        sum("star_" in sample.fields["source"] and "step.svg" in sample.fields["source"] for sample in everything) <= 12
    )


def test_emoji_labels_are_learnable_and_concepts_stay_together() -> None:
    labels = {split: {sample.fields["label"] for sample in read("emoji", split)} for split in samples.SPLITS}
    assert labels["val"] | labels["test"] <= labels["train"]
    codes = {split: {sample.fields["hexcode"] for sample in read("emoji", split)} for split in samples.SPLITS}
    assert all(codes[a].isdisjoint(codes[b]) for a, b in combinations(samples.SPLITS, 2))


@pytest.mark.parametrize("split", samples.SPLITS)
def test_every_emoji_is_drawn_by_three_vendors(split: str) -> None:
    vendors = defaultdict(set)
    for sample in read("emoji", split):
        assert sample.text == sample.fields["name"]
        assert sample.fields["label"] == sample.fields["subgroup"]
        vendors[sample.fields["hexcode"]].add(sample.fields["vendor"])
    assert all(found == {"openmoji", "noto", "fluent-emoji-flat"} for found in vendors.values())


def test_documents_are_complete() -> None:
    assert 60 <= len(read_documents()) <= 150
    used = set()
    for document in read_documents():
        assert document["license"] in LICENSES["documents"]
        assert document["source"]
        assert document["split"] in samples.SPLITS
        assert all(document["text_list"])
        assert document["image_info"]
        for info in document["image_info"]:
            assert 0 <= info["matched_text_index"] < len(document["text_list"])
            assert info["matched_sim"] is None
            used.add(info["image_name"])
    images = {file.name: file for file in (samples.documents() / "images").iterdir()}
    assert used == set(images)
    for file in images.values():
        with Image.open(file) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 224
            image.load()


def test_documents_are_split_by_content() -> None:
    pictures: dict[str, set[str]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for document in read_documents():
        counts[document["split"]] += 1
        for info in document["image_info"]:
            pictures[document["split"]].add(info["image_name"])
    for split, share in SHARES["documents"].items():
        assert counts[split] / len(read_documents()) == pytest.approx(share, abs=0.04)
    assert all(pictures[a].isdisjoint(pictures[b]) for a, b in combinations(samples.SPLITS, 2))


def test_an_unknown_name_is_refused_in_a_plain_sentence() -> None:
    with pytest.raises(ValueError, match="There is no sample set 'photos': choose one of"):
        samples.path("photos", "train")
    with pytest.raises(ValueError, match="There is no split 'dev': choose one of"):
        samples.path("clipart", "dev")
