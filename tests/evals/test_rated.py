"""Extra positives and rank correlation: against slow references, and CxC's files as they are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from altsight.core.errors import UserError
from altsight.data.prepare import read_pairs
from altsight.evals.base import Rating, Split, Task
from altsight.evals.bootstrap import hits_of
from altsight.evals.rated import best_ranks, rated, read_ratings
from tests.evals.conftest import COLOURS, MakeSplit, Sample, make_view

MakeTask = Callable[..., Task]


@pytest.fixture
def make_task(make_split: MakeSplit) -> MakeTask:
    """Three colours, twice each, described by their colour; the label is the id of an image."""

    def make(*ratings: Rating, **fields: str) -> Task:
        names = ("red", "green", "blue", "red", "green", "blue")
        split = make_split("test", [Sample(COLOURS[n], f"{i}.jpg", f"{n} {i}") for i, n in enumerate(names)])
        return Task("t", split, split, split, ratings=ratings, image_id="kind", **fields)

    return make


def image(i: int) -> tuple[str, str]:
    return ("image", f"{i}.jpg")


def caption(text: str) -> tuple[str, str]:
    return ("caption", text)


def test_ranks_are_those_of_a_full_sort() -> None:
    draw = np.random.default_rng(0)
    queries, gallery = (torch.tensor(draw.normal(size=(n, 4))).float() for n in (12, 20))
    right = [draw.choice(20, size=draw.integers(1, 4), replace=False).tolist() for _ in range(12)]
    itself = [int(draw.integers(-1, 20)) for _ in range(12)]
    right = [[r for r in rows if r != own] or [(own + 1) % 20] for rows, own in zip(right, itself, strict=True)]
    found = best_ranks(queries, gallery, right, itself)
    for q, rows, own, rank in zip(range(12), right, itself, found.tolist(), strict=True):
        scores = (gallery @ queries[q]).tolist()
        order = [i for i in sorted(range(20), key=lambda i: -scores[i]) if i != own]
        assert rank == min(order.index(row) for row in rows)


def test_an_extra_positive_turns_a_miss_into_a_hit(make_task: MakeTask) -> None:
    view = make_view(dual=True)
    plain = {r.metric: r for r in rated(view, make_task(Rating(image(0), caption("blue 2"), 1.0)))}
    # Images 0 and 3 are equal, and so are their captions: the first wins, and image 3 misses.
    assert hits_of(plain["image_to_text_r1"]).tolist() == [True, True, True, False, False, False]
    more = {r.metric: r for r in rated(view, make_task(Rating(image(3), caption("red 0"), 3.0)))}
    assert hits_of(more["image_to_text_r1"]).tolist() == [True, True, True, True, False, False]
    assert hits_of(more["text_to_image_r1"]).tolist() == [True, True, True, False, False, False]


def test_within_one_kind_nothing_finds_itself(make_task: MakeTask) -> None:
    ratings = (
        Rating(image(0), image(3), 5.0),
        Rating(image(1), image(2), 4.0),
        Rating(image(4), image(5), 2.0),
        Rating(caption("red 0"), caption("red 3"), 4.5),
    )
    results = {r.metric: r for r in rated(make_view(dual=True), make_task(*ratings))}
    # 0 and 3 look alike; 1 and 2 were rated alike but do not look so; 4 and 5 were not.
    assert results["image_to_image_r1"].n == 4
    assert hits_of(results["image_to_image_r1"]).tolist() == [True, False, False, True]
    assert results["text_to_text_r1"].value == 1 and results["text_to_text_r1"].n == 2


def test_images_are_compared_without_a_text_tower(make_task: MakeTask) -> None:
    ratings = (Rating(image(0), image(3), 5.0), Rating(image(0), image(1), 0.0), Rating(image(2), caption("red 0"), 0))
    results = {r.metric: r for r in rated(make_view(), make_task(*ratings))}
    assert results["image_to_image_r1"].value == 1
    assert results["image_to_text_r1"].value is None and "text tower" in results["image_to_text_r1"].note


def test_correlation_is_the_mean_of_spearmans_over_halves_of_the_queries(make_split: MakeSplit) -> None:
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, size=(12, 3))
    samples = [Sample(tuple(map(int, c)), f"{i}.jpg", str(i)) for i, c in enumerate(colours)]
    split = make_split("test", samples)
    scores = {i: float(draw.random() * 5) for i in range(11)}
    ratings = tuple(Rating(image(i), image(i + 1), score) for i, score in scores.items())
    task = Task("t", split, split, split, ratings=ratings, image_id="kind")
    found = next(r for r in rated(make_view(dual=True), task) if r.metric == "spearman_image_image")
    vectors = torch.nn.functional.normalize(torch.tensor(colours).float() / 255 - 0.5, dim=1)
    cosines = (vectors[:-1] * vectors[1:]).sum(dim=1).numpy()
    halves = [draw.permutation(11)[:5] for _ in range(4000)]
    values = [spearmanr(cosines[rows], np.array(list(scores.values()))[rows]).statistic for rows in halves]
    assert found.value == pytest.approx(float(np.mean(values)), abs=0.05)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.11)
    assert found.extra["ratings"] == 11 and found.extra["seed"] == 0 and found.n == 11


def test_published_files_are_read(tmp_path: Path) -> None:
    sits, sts = tmp_path / "sits_test.csv", tmp_path / "sts_test.csv"
    sits.write_text(
        "caption,image,agg_score,sampling_method\n"
        "COCO_val2014:sentid:732091,COCO_val2014_000000365325.jpg,2.2,c2i_intrasim\n"
    )
    sts.write_text("caption1,caption2,agg_score,sampling_method\nCOCO_val2014:sentid:1,COCO_val2014:sentid:2,3.1,x\n")
    assert read_ratings([str(sits), str(sts)]) == (
        Rating(("caption", "732091"), ("image", "COCO_val2014_000000365325.jpg"), 2.2),
        Rating(("caption", "1"), ("caption", "2"), 3.1),
    )
    sts.write_text("caption1,caption2,agg_score\n1,2,3.5\n1,3,\n")
    with pytest.raises(UserError, match=r"line 3 of '.*sts_test\.csv' has no number"):
        read_ratings([str(sts)])
    sits.write_text("a,b,agg_score\n1,2,3\n")
    with pytest.raises(UserError, match="must begin with two columns image or caption"):
        read_ratings([str(sits)])
    with pytest.raises(UserError, match=r"no\.csv' cannot be read"):
        read_ratings([str(tmp_path / "no.csv")])


def test_ids_that_lead_nowhere_are_counted_or_refused(make_task: MakeTask) -> None:
    known = Rating(image(0), image(3), 5.0)
    results = list(rated(make_view(dual=True), make_task(known, Rating(image(9), image(3), 5.0))))
    assert all(r.note == "1 ratings name what is not there" for r in results)
    with pytest.raises(UserError, match="check image_id and caption_ids"):
        list(rated(make_view(dual=True), make_task(Rating(image(8), image(9), 5.0))))


def test_captions_without_an_id_each_are_told(tmp_path: Path) -> None:
    rows = []
    for i, (name, ids) in enumerate((("red", [7, 8]), ("blue", 9), ("green", [10, 11]))):
        Image.new("RGB", (8, 8), COLOURS[name]).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "captions": [name, f"a {name} thing"], "sentids": ids})
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    split = Split("test", read_pairs(str(tmp_path / "table.jsonl"), ("{captions[]}",)))
    ratings = (Rating(caption("8"), ("image", "0.png"), 5.0), Rating(caption("9"), ("image", "1.png"), 5.0))
    task = Task("t", split, split, split, ratings=ratings, image_id="path", caption_ids="sentids")
    results = list(rated(make_view(dual=True), task))
    note = "the captions of 1 images have not an id each; 1 ratings name what is not there"
    assert results and all(r.note == note for r in results)
