from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from altsight.core.errors import UserError
from altsight.data.prepare import read_pairs
from altsight.evals.base import Split, Task, no_split
from altsight.evals.classes import words
from altsight.evals.zeroshot import classifier, names_of, zeroshot
from tests.evals.conftest import COLOURS, MakeSplit, Sample, coloured, make_view, near


class RandomTexts:
    """Stands in for a view: each text has a random unit vector; remembers what it was asked for."""

    name = "random"

    def __init__(self) -> None:
        self.cache: dict[str, object] = {}
        self.asked: list[list[str]] = []

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.asked.append(list(texts))
        return torch.tensor(np.stack([self.vector(text) for text in texts])).float()

    @staticmethod
    def vector(text: str) -> np.ndarray:
        vector = np.random.default_rng(list(text.encode())).normal(size=6)
        return vector / np.sqrt((vector**2).sum())


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts() -> None:
    classes, prompts = ["cat", "big_dog", "air-plane/jet"], ["a {}", "the {} there", "{}"]
    found = classifier(RandomTexts(), classes, prompts).numpy()  # type: ignore[arg-type]
    for row, name in zip(found, ["cat", "big dog", "air plane jet"], strict=True):
        mean = sum(RandomTexts.vector(text) for text in (f"a {name}", f"the {name} there", name)) / 3
        np.testing.assert_allclose(row, mean / np.sqrt((mean**2).sum()), rtol=1e-5)


def test_the_classifier_is_kept_for_its_classes_and_prompts() -> None:
    view = RandomTexts()
    for prompts in (["a {}"], ["a {}"], ["the {}"]):
        classifier(view, ["cat", "dog"], prompts)  # type: ignore[arg-type]
    assert view.asked == [["a cat", "a dog"], ["the cat", "the dog"]]


def test_labels_become_words() -> None:
    assert words("animal-mammal") == "animal mammal"
    assert words("_food__sweet/cake ") == "food sweet cake"


def test_top1_of_a_view(colours: Task) -> None:
    result, _ = zeroshot(make_view(dual=True), colours)
    assert result.value == 1
    assert result.chance == pytest.approx(1 / 3)
    assert (result.n, result.metric, result.feature_point) == (24, "top1", "mean, projected")
    assert result.extra["prompts"] == ["{}", "{} thing"]
    assert result.extra["commonest"] == pytest.approx(1 / 3)


def test_top5_counts_the_five_nearest_classes(make_split: MakeSplit) -> None:
    # Only the colours have a text vector of their own; the other classes all lie at grey, and ties go by index.
    samples = [Sample(near("red", i), name) for i in range(4) for name in ("red", "a", "b", "c", "d", "e")]
    split = make_split("test", samples)
    top1, top5, mean = zeroshot(make_view(dual=True), Task("t", split, split, split, label="kind"))
    # The ranking is red, then a, b, c, d, e: only e is not among five, and only red is first.
    assert (top1.value, top5.value) == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert mean.value == pytest.approx(1 / 6)
    assert (top1.chance, top5.chance) == (pytest.approx(1 / 6), pytest.approx(5 / 6))


def test_samples_without_a_label_or_image_do_not_shift_the_others(make_split: MakeSplit) -> None:
    samples = coloured(3)
    samples[2], samples[4] = Sample(None, "blue"), Sample(COLOURS["red"])
    split = make_split("test", samples)
    result, _ = zeroshot(make_view(dual=True), Task("t", split, split, split, label="kind"))
    assert (result.value, result.n) == (1, 7)
    assert result.note == "test: left out 1 with a broken image and 1 with no label"


def test_shuffled_labels_give_chance(make_split: MakeSplit) -> None:
    draw = np.random.default_rng(0)
    names = ("red", "green", "blue")
    samples = [Sample(s.colour, str(draw.choice(names))) for s in coloured(60)]
    split = make_split("test", samples)
    result, _ = zeroshot(make_view(dual=True, batch_size=64), Task("t", split, split, split, label="kind"))
    assert result.low is not None and result.high is not None
    assert result.low < 1 / 3 < result.high


def test_without_a_text_tower_it_is_not_applicable(colours: Task) -> None:
    results = list(zeroshot(make_view(), colours))
    assert [result.metric for result in results] == ["top1", "mean_class"]
    for result in results:
        assert result.value is None and result.low is None
        assert result.note == "not applicable: this encoder has no text tower"


def test_a_task_without_labels_yields_nothing(colours: Task) -> None:
    assert list(zeroshot(make_view(dual=True), Task("plain", colours.train, colours.val, colours.test))) == []


@pytest.mark.parametrize("prompts", [("a photo",), ("{} and {}",), ()])
def test_a_prompt_needs_one_place_for_the_class(prompts: tuple[str, ...], colours: Task) -> None:
    task = Task("t", colours.train, colours.val, colours.test, label="kind", prompts=prompts)
    with pytest.raises(UserError, match="prompt"):
        list(zeroshot(make_view(dual=True), task))


def test_mean_over_classes_weighs_every_class_alike(make_split: MakeSplit) -> None:
    # Nine reds are right; the three greens are drawn blue, so they are wrong.
    samples = [Sample(COLOURS["red"], "red")] * 9 + [Sample(COLOURS["blue"], "green")] * 3
    split = make_split("test", [*samples, Sample(COLOURS["blue"], "blue")])
    top1, mean = zeroshot(make_view(dual=True), Task("t", split, split, split, label="kind"))
    assert (top1.value, mean.value) == (pytest.approx(10 / 13), pytest.approx(2 / 3))


def test_names_of_a_class_file_stand_in_the_prompts_as_they_are(make_split: MakeSplit) -> None:
    split = make_split("test", [Sample(COLOURS["red"], "n1"), Sample(COLOURS["blue"], "n2")])
    names = {"n1": "semi-red", "n2": "blue", "n3": "green"}
    task = Task("t", split, split, split, label="kind", classes=names)
    results = {r.metric: r for r in zeroshot(make_view(dual=True), task)}
    assert names_of(task) == ("semi-red", "blue", "green")
    assert results["top1"].value == 1 and results["top1"].chance == pytest.approx(1 / 3)
    assert results["mean_class"].note == "2 of 3 classes occur"
    assert "shorter side 8 (bicubic), centre 8 x 8" in results["top1"].extra["preprocess"]


def test_samples_of_classes_outside_of_the_set_are_left_out(colours: Task) -> None:
    task = replace(colours, classes={"red": "red", "green": "green"})
    top1, _ = zeroshot(make_view(dual=True), task)
    assert (top1.value, top1.n, top1.chance) == (1, 16, 0.5)
    assert top1.note == "test: left out 8 with a class outside of the set"


def test_metrics_that_a_task_asks_for(make_split: MakeSplit) -> None:
    kinds = ["red", "a", "b", "c", "d", "e"]
    split = make_split("test", [Sample(near("red", i), name) for i in range(4) for name in kinds])
    task = Task("t", split, split, split, label="kind", metrics=("top1", "top1_top5"))
    top1, both = zeroshot(make_view(dual=True), task)
    assert both.metric == "top1_top5" and both.value == pytest.approx((1 / 6 + 5 / 6) / 2)
    assert both.low <= both.value <= both.high and both.extra["seed"] == 0 and top1.extra["seed"] == 0


def test_roc_auc_of_two_classes_is_that_of_scikit_learn(make_split: MakeSplit) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, size=(60, 3))
    labels = ["red" if p[0] + 80 * draw.normal() > p[2] else "blue" for p in pixels]
    split = make_split("test", [Sample(tuple(map(int, p)), name) for p, name in zip(pixels, labels, strict=True)])
    task = Task("t", split, split, split, label="kind", metrics=("roc_auc",))
    (found,) = zeroshot(make_view(dual=True), task)
    view = make_view(dual=True)
    vectors = torch.nn.functional.normalize(torch.tensor(pixels).float() / 255 - 0.5, dim=1)
    scores = (vectors @ classifier(view, ["blue", "red"], ["{}"]).T).numpy()
    expected = roc_auc_score(np.array(labels) == "red", scores[:, 1] - scores[:, 0])
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.chance == 0.5 and found.low < found.value < found.high
    with pytest.raises(UserError, match="has 3 classes: roc_auc is of two"):
        list(zeroshot(view, replace(task, classes={"red": "", "blue": "", "green": ""})))


def lists(tmp_path: Path, rows: list[tuple[str, list[str]]]) -> Split:
    """Write images and a JSON list of labels each, as a table beside a folder."""
    for name, _ in rows:
        Image.new("RGB", (8, 8), COLOURS[name]).save(tmp_path / f"{name}.png")
    lines = [json.dumps({"path": f"{name}.png", "kinds": kinds}) for name, kinds in rows]
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    return Split("test", read_pairs(str(tmp_path / "table.jsonl"), ()))


def test_several_labels_an_image_are_ranked_class_by_class(tmp_path: Path) -> None:
    rows = [("red", ["red", "warm"]), ("blue", ["blue"]), ("green", ["green"]), ("grey", ["warm"]), ("red", [])]
    split = lists(tmp_path, rows)
    task = Task("t", no_split("train"), no_split("val"), split, label="kinds", multi_label=True)
    view = make_view(dual=True)
    results = {r.metric: r for r in zeroshot(view, task)}
    assert list(results) == ["map11", "map"] and results["map"].n == 4
    assert results["map"].note == "test: left out 1 with no label"
    classes = ["blue", "green", "red", "warm"]
    images = torch.nn.functional.normalize(torch.tensor([COLOURS[n] for n, k in rows if k]).float() / 255 - 0.5, dim=1)
    scores = (images @ classifier(view, classes, ["{}"]).T).numpy()
    truth = np.array([[c in kinds for c in classes] for _, kinds in rows if kinds])
    expected = average_precision_score(truth, scores, average="macro")
    assert results["map"].value == pytest.approx(expected, abs=1e-6)
    assert results["map"].low <= results["map"].value <= results["map"].high
