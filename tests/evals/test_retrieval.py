from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch

from altsight.data.captions import Captions
from altsight.data.sources import Pairs
from altsight.evals import retrieval as module
from altsight.evals.base import Split, Task
from altsight.evals.bootstrap import hits_of
from altsight.evals.retrieval import Gallery, image_to_text, retrieval, text_to_image
from tests.evals.conftest import COLOURS, MakeSplit, Sample, make_view


def gallery(images: int = 23, distinct: int = 31, seed: int = 0) -> Gallery:
    """Return random vectors with one to four captions an image; some captions belong to several images."""
    draw = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), draw.integers(1, 5, images))
    vectors = [draw.normal(size=(n, 5)) for n in (images, distinct)]
    of_images, of_texts = (torch.tensor(v / np.linalg.norm(v, axis=1, keepdims=True)).float() for v in vectors)
    return Gallery(of_images, of_texts, torch.tensor(draw.integers(0, distinct, len(owners))), torch.tensor(owners))


def place(scores: list[float], index: int) -> int:
    """Return where `index` comes in the stable descending order of `scores`."""
    return sorted(range(len(scores)), key=lambda i: -scores[i]).index(index)


@pytest.mark.parametrize("block", [1, 150, 2**24])
def test_ranks_are_those_of_a_full_sort(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    g = gallery()
    similarity = g.images.double().numpy() @ g.texts.double().numpy().T
    owners, captions = g.owners.tolist(), g.captions.tolist()
    to_text = []
    for image in range(len(g.images)):
        scores = [float(similarity[image, c]) for c in captions]
        to_text.append(min(place(scores, i) for i, owner in enumerate(owners) if owner == image))
    to_image = [place(similarity[:, c].tolist(), owner) for c, owner in zip(captions, owners, strict=True)]
    assert image_to_text(g).tolist() == to_text
    assert text_to_image(g).tolist() == to_image


def described() -> list[Sample]:
    """Return twelve images of three colours in turn, described by their colour: every caption is shared."""
    return [Sample(COLOURS[name], text=name) for name in ("red", "green", "blue") * 4]


def task_of(split: Split) -> Task:
    return Task("t", split, split, split)


def test_recall_of_a_view_both_ways(make_split: MakeSplit) -> None:
    names = ("red", "green", "blue")
    split = make_split("test", [Sample(COLOURS[name], text=name) for name in names])
    results = {r.metric: r for r in retrieval(make_view(dual=True), task_of(split))}
    assert list(results) == [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert all(r.value == 1 and r.n == 3 and not r.note for r in results.values())
    assert results["text_to_image_r1"].chance == results["image_to_text_r1"].chance == pytest.approx(1 / 3)
    assert results["text_to_image_r5"].chance == 1


def test_captions_shared_by_images_count_on_the_exact_index(make_split: MakeSplit) -> None:
    split = make_split("test", described())
    results = {r.metric: r for r in retrieval(make_view(dual=True), task_of(split))}
    # Four equal images and captions of each colour: the first of them wins both ways.
    assert results["image_to_text_r1"].value == results["text_to_image_r1"].value == 0.25
    assert results["image_to_text_r5"].value == 1
    assert results["image_to_text_r1"].note == "12 captions belong to several images"
    assert results["image_to_text_r1"].extra["shared_captions"] == 12


def test_one_of_several_captions_is_a_hit(make_split: MakeSplit) -> None:
    names = ("red", "green", "blue")
    plain = make_split("test", [Sample(COLOURS[name], "thing", name) for name in names])
    source = Pairs(plain.source.index, Captions(("grey {kind}", "{txt}")))
    results = {r.metric: r for r in retrieval(make_view(dual=True), task_of(Split("test", source)))}
    to_text, to_image = results["image_to_text_r1"], results["text_to_image_r1"]
    assert (to_text.value, to_text.n) == (1, 3)
    assert to_image.n == 6 and to_image.extra["group_sizes"] == [2, 2, 2]
    assert hits_of(to_image)[1::2].all()


def test_chance_with_several_captions_is_hypergeometric() -> None:
    counts = [1, 3, 2, 4]
    for k in (1, 5, 10):
        expected = np.mean([1 - comb(10 - c, k) / comb(10, k) for c in counts])
        assert module._chance_to_text(torch.tensor(counts), k) == pytest.approx(expected)


def test_a_collapsed_encoder_scores_chance_not_everything() -> None:
    g = gallery()
    flat = Gallery(torch.ones_like(g.images), torch.ones_like(g.texts), g.captions, g.owners)
    assert float((text_to_image(flat) < 1).float().mean()) == pytest.approx(float((g.owners == 0).float().mean()))
    assert int((image_to_text(flat) < 1).sum()) == 1


def test_random_vectors_score_chance() -> None:
    draw = np.random.default_rng(0)
    images, texts = (torch.tensor(draw.normal(size=(400, 16))).float() for _ in range(2))
    found = text_to_image(Gallery(images, texts, torch.arange(400), torch.arange(400)))
    assert float((found < 100).float().mean()) == pytest.approx(0.25, abs=0.08)


def test_broken_and_undescribed_images_do_not_shift_the_others(make_split: MakeSplit) -> None:
    samples = [
        Sample(None, text="red"),
        Sample(COLOURS["red"], text="red"),
        Sample(COLOURS["blue"]),
        Sample(COLOURS["green"], text="green"),
    ]
    split = make_split("test", samples)
    results = list(retrieval(make_view(dual=True, batch_size=3), task_of(split)))
    assert all(r.value == 1 and r.n == 2 for r in results)
    assert results[0].note == "test: left out 1 with a broken image and 1 with no caption"


def test_without_a_text_tower_it_is_not_applicable(make_split: MakeSplit) -> None:
    results = list(retrieval(make_view(), task_of(make_split("test", described()))))
    assert len(results) == 6
    assert all(r.value is None and r.note == "not applicable: this encoder has no text tower" for r in results)


def test_a_task_without_captions_yields_nothing(make_split: MakeSplit) -> None:
    split = make_split("test", [Sample(COLOURS["red"]), Sample(COLOURS["blue"])])
    assert list(retrieval(make_view(dual=True), task_of(split))) == []
