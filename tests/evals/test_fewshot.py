"""VTAB's few-shot protocol: what is drawn, what is averaged, and with which interval."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from altsight.evals import evaluate, fewshot
from altsight.evals.base import Task, no_split
from altsight.evals.fewshot import drawn, suite
from altsight.evals.fewshot import fewshot as evaluator
from tests.evals.conftest import MakeSplit, Sample, coloured, make_view


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "TRAIN", 8)
    monkeypatch.setattr(fewshot, "VAL", 2)


def names(split) -> list[str]:
    return [split.source.fields(i)["kind"] + split.source.name(i) for i in range(len(split))]


def test_training_and_validation_examples_are_apart_and_keyed_by_seed(few: None, make_split: MakeSplit) -> None:
    train = make_split("train", coloured(8))
    task = Task("t", train, no_split("val"), train, "kind")
    fit, choose = drawn(task, 0)
    assert (len(fit), len(choose)) == (8, 2)
    places = [set(part.source.rows) for part in (fit, choose)]
    assert not places[0] & places[1]
    assert [part.source.rows for part in drawn(task, 0)] == [fit.source.rows, choose.source.rows]
    assert drawn(task, 1)[0].source.rows != fit.source.rows
    row = fit.source.rows[3]
    assert fit.source.image(3) == train.source.image(row) and fit.source.fields(3) == train.source.fields(row)


def test_validation_examples_come_from_the_validation_split(few: None, colours: Task) -> None:
    fit, choose = drawn(colours, 0)
    assert (len(fit), len(choose)) == (8, 2)
    assert choose.source.index is colours.val.source.index


def test_fewer_examples_are_shared_in_the_same_ratio(make_split: MakeSplit) -> None:
    train = make_split("train", coloured(5))
    assert [len(part) for part in drawn(Task("t", train, no_split("val"), train, "kind"), 0)] == [12, 3]


def noisy(make_split: MakeSplit, name: str, group: str) -> Task:
    draw = np.random.default_rng(len(name))
    kinds = ("red", "green", "blue")
    samples = [replace(s, label=str(draw.choice(kinds)) if draw.random() < 0.4 else s.label) for s in coloured(20)]
    return Task(
        name, make_split(f"{name}-train", samples), no_split("val"), make_split(name, samples), "kind", group=group
    )


def test_accuracy_is_the_mean_over_draws(few: None, make_split: MakeSplit) -> None:
    (result,) = evaluator(make_view(batch_size=64), noisy(make_split, "a", "natural"))
    assert result.value == pytest.approx(np.mean(result.extra["draws"]))
    assert result.n == 60 and sum(result.extra["right"]) == 60 and result.extra["examples"] == 10
    assert result.value == pytest.approx(np.dot(result.extra["right"], np.arange(4)) / 3 / 60)
    assert result.low < result.value < result.high and result.extra["seed"] == [0, 1, 2]
    assert result.chance == pytest.approx(1 / 3)


def test_the_suite_averages_groups_and_all_tasks(few: None, make_split: MakeSplit) -> None:
    tasks = [noisy(make_split, *pair) for pair in (("a", "natural"), ("bb", "natural"), ("ccc", "structured"))]
    results = evaluate(make_view(batch_size=64), tasks, ["fewshot"])
    values = {r.task: r.value for r in results}
    assert list(values) == ["a", "bb", "ccc", "group natural", "group structured", "all tasks"]
    assert values["group natural"] == pytest.approx((values["a"] + values["bb"]) / 2)
    assert values["all tasks"] == pytest.approx((values["a"] + values["bb"] + values["ccc"]) / 3)
    mean = results[-1]
    assert mean.n == 180 and mean.extra["tasks"] == ["a", "bb", "ccc"]
    widths = [r.high - r.low for r in results[:3]]
    assert mean.high - mean.low == pytest.approx(np.sqrt(np.sum(np.square(widths))) / 3, rel=0.15)


def test_tasks_without_a_group_are_no_suite(few: None, colours: Task) -> None:
    results = evaluate(make_view(batch_size=64), [colours], ["fewshot"])
    assert [r.task for r in results] == ["colours"]
    assert list(suite([])) == []


def test_it_yields_nothing_without_labels_or_training_images(make_split: MakeSplit) -> None:
    split = make_split("test", [Sample((1, 2, 3), "red")])
    assert list(evaluator(make_view(), Task("t", split, split, split))) == []
    assert list(evaluator(make_view(), Task("t", no_split("train"), no_split("val"), split, "kind"))) == []
