"""Robustness sets: restricted classes, the clean reference, and the drop between them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from altsight.evals.base import Task, no_split
from altsight.evals.frozen import frozen_classifier
from altsight.evals.robustness import robustness
from tests.evals.conftest import COLOURS, MakeSplit, Sample, coloured, make_view


@pytest.fixture
def shifted(make_split: MakeSplit, colours: Task) -> Task:
    """Reds and greens, of which half of the reds are drawn blue; compared with the three clean colours."""
    samples = [Sample(COLOURS["red"], "red"), Sample(COLOURS["blue"], "red"), Sample(COLOURS["green"], "green")] * 4
    return Task("shifted", no_split("train"), no_split("val"), make_split("shifted", samples), "kind", clean=colours)


@pytest.mark.parametrize("dual", [True, False], ids=["zero-shot", "linear probe"])
def test_answers_are_restricted_to_the_classes_that_the_set_has(dual: bool, shifted: Task) -> None:
    results = {r.metric: r for r in robustness(make_view(dual=dual), shifted)}
    # Blue is no answer here: a blue "red" is answered red or green, the nearer of the two.
    assert results["top1"].chance == 0.5 and results["top1"].n == 12
    assert results["clean_top1"].value == 1 and results["clean_top1"].n == 16, "blue is left out of the clean set too"
    drop = results["drop"]
    assert drop.value == pytest.approx(results["clean_top1"].value - results["top1"].value)
    assert drop.low <= drop.value <= drop.high and drop.extra["seed"] == 0
    assert drop.extra["classifier"] == ("zeroshot" if dual else "linear")


def test_the_mask_changes_the_answer(make_split: MakeSplit, colours: Task, shifted: Task) -> None:
    masked = {r.metric: r.value for r in robustness(make_view(dual=True), shifted)}
    of_all = replace(shifted, classes={name: name for name in ("blue", "green", "red")})
    unmasked = {r.metric: r.value for r in robustness(make_view(dual=True), of_all)}
    assert unmasked["top1"] == pytest.approx(8 / 12) and masked["top1"] >= unmasked["top1"]


def test_other_labels_are_compared_with_all_clean_classes(make_split: MakeSplit, colours: Task) -> None:
    split = make_split("objects", [Sample(COLOURS["red"], "red_mug"), Sample(COLOURS["green"], "green_mug")])
    task = Task("objects", no_split("train"), no_split("val"), split, "kind", clean=colours)
    results = {r.metric: r for r in robustness(make_view(dual=True), task)}
    assert results["top1"].value == 1 and results["clean_top1"].n == 24
    assert "answered among all of its classes" in results["drop"].note
    (result,) = robustness(make_view(), task)
    assert result.value is None and result.note.endswith("and a probe on 'colours' has other labels")


def test_a_probe_needs_clean_training_images(make_split: MakeSplit, shifted: Task) -> None:
    test_only = Task("clean", no_split("train"), no_split("val"), make_split("clean", coloured(3)), "kind")
    (result,) = robustness(make_view(), replace(shifted, clean=test_only))
    assert result.value is None and result.note.endswith("and the task no images to train a probe on")


def test_a_probe_never_answers_what_it_was_not_trained_on(make_split: MakeSplit, colours: Task) -> None:
    test = make_split("more", [*coloured(2), Sample(COLOURS["grey"], "grey")])
    classifier = frozen_classifier(make_view(), replace(colours, test=test))
    hits, used = classifier.hits(make_view(), replace(colours, test=test), test)
    assert hits.tolist() == [True] * 6 + [False] and len(used.labels) == 7


def test_without_a_clean_task_it_yields_nothing(colours: Task) -> None:
    assert list(robustness(make_view(dual=True), colours)) == []
    several = replace(colours, multi_label=True)
    assert list(robustness(make_view(dual=True), replace(colours, clean=several))) == []
