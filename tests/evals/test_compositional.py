"""Winoground and SugarCrepe: scores against the definition and CLIP_benchmark's, layouts, chance, and refusals."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from PIL import Image

from altsight.core.errors import UserError
from altsight.evals.base import Task, no_split
from altsight.evals.compositional import CHANCE, compositional, hits, read_sugarcrepe, read_winoground
from tests.evals.conftest import COLOURS, make_view


def task(contests: tuple) -> Task:
    return Task("t", no_split("train"), no_split("val"), no_split("test"), contests=contests)


def winoground(folder: Path, rows: list[tuple[str, str, str, str]]) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / "images" / f"{name}.png")
    keys = ("image_0", "image_1", "caption_0", "caption_1")
    lines = [json.dumps({"id": i} | dict(zip(keys, row, strict=True))) for i, row in enumerate(rows)]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_scores_are_the_definition() -> None:
    similarities = torch.randn(500, 2, 2, generator=torch.Generator().manual_seed(0))
    found = hits(similarities)
    for s, text, image, group in zip(similarities, found["text"], found["image"], found["group"], strict=True):
        assert bool(text) == bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
        assert bool(image) == bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
        assert bool(group) == bool(text and image)
    assert not any(bool(v.any()) for v in hits(torch.ones(3, 2, 2)).values()), "a tie is a miss"


def test_chance_is_the_share_of_orders() -> None:
    orders = torch.tensor(list(permutations(range(4)))).float().unflatten(1, (2, 2))
    assert {name: float(value.float().mean()) for name, value in hits(orders).items()} == pytest.approx(CHANCE)


def test_winoground_of_a_view(tmp_path: Path) -> None:
    rows = [("red", "blue", "a red thing", "a blue thing"), ("green", "red", "the red one", "the green one")]
    contests = read_winoground(winoground(tmp_path, rows))
    results = {r.metric: r for r in compositional(make_view(dual=True), task(contests))}
    assert [results[m].value for m in ("text", "image", "group")] == [0.5, 0.5, 0.5]
    assert results["group"].chance == pytest.approx(1 / 6) and results["group"].n == 2
    assert len(results["text"].data) == 12 and "shorter side 8" in results["text"].extra["preprocess"]


def sugarcrepe(folder: Path) -> tuple[str, str]:
    images, subsets = folder / "val2017", folder / "data"
    images.mkdir()
    subsets.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(images / f"{name}.png")
    right = {"filename": "red.png", "caption": "red", "negative_caption": "blue"}
    wrong = {"filename": "red.png", "caption": "blue", "negative_caption": "red"}
    (subsets / "swap_obj.json").write_text(json.dumps({"0": right, "7": right, "9": wrong, "11": right}))
    (subsets / "add_att.json").write_text(json.dumps({"0": right}))
    return str(subsets), str(images)


def test_sugarcrepe_reports_each_subset_and_their_mean(tmp_path: Path) -> None:
    results = {r.metric: r for r in compositional(make_view(dual=True), task(read_sugarcrepe(*sugarcrepe(tmp_path))))}
    assert results["accuracy_add_att"].value == 1 and results["accuracy_swap_obj"].value == 0.75
    mean = results["mean_subset"]
    assert mean.value == pytest.approx(0.875) and mean.chance == 0.5 and mean.n == 5
    assert mean.low is not None and mean.low < 0.875 <= 1


def test_without_a_text_tower_it_is_not_applicable(tmp_path: Path) -> None:
    contests = read_winoground(winoground(tmp_path, [("red", "blue", "red", "blue")]))
    results = list(compositional(make_view(), task(contests)))
    assert [r.metric for r in results] == ["text", "image", "group"] and all(r.value is None for r in results)
    assert list(compositional(make_view(dual=True), task(()))) == []


def test_wrong_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"examples\.jsonl' cannot be read"):
        read_winoground(str(tmp_path))
    winoground(tmp_path, [("red", "pink", "red", "pink")])
    with pytest.raises(UserError, match=r"names the image 'pink', which is not in"):
        read_winoground(str(tmp_path))
    (tmp_path / "examples.jsonl").write_text('{"id": 0}')
    with pytest.raises(UserError, match=r"line 1 of .* must be a JSON object with image_0"):
        read_winoground(str(tmp_path))
    (tmp_path / "examples.jsonl").write_text('{"image_0": "red", "image_1": "red", "caption_0": 3, "caption_1": "a"}')
    with pytest.raises(UserError, match=r"must be a JSON object .* as text"):
        read_winoground(str(tmp_path))
    with pytest.raises(UserError, match="holds no JSON file"):
        read_sugarcrepe(str(tmp_path / "images"), str(tmp_path))
    for row in ('{"filename": "x"}', '{"filename": "x", "caption": "a", "negative_caption": null}'):
        (tmp_path / "swap.json").write_text(f'{{"0": {row}}}')
        with pytest.raises(UserError, match="is no subset of SugarCrepe"):
            read_sugarcrepe(str(tmp_path), str(tmp_path))


def test_a_broken_image_is_one_sentence(tmp_path: Path) -> None:
    contests = read_winoground(winoground(tmp_path, [("red", "blue", "red", "blue")]))
    (tmp_path / "images" / "red.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="an image of the contests cannot be decoded"):
        list(compositional(make_view(dual=True), task(contests)))
