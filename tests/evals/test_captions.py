"""Captions of a split: every distinct image once, with all of its references; whole sets are scored."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from altsight.evals import evaluate
from altsight.evals.base import Task, View
from altsight.evals.caption_metrics import METRICS, caption_scores
from altsight.evals.captions import score_captions, write_captions
from altsight.nn.decoding import BEAM, Decoding
from tests.evals.conftest import COLOURS, MakeSplit, Sample, make_view, near


class Painter:
    """Names the colour of an image; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, images: Tensor, decoding: Decoding) -> list[str]:
        self.asked.append((len(images), decoding))
        means = images.float().mean(dim=(2, 3))
        table = torch.tensor(list(COLOURS.values())).float()
        return [f"a {list(COLOURS)[int(i)]} thing" for i in torch.cdist(means, table).argmin(dim=1)]


@pytest.fixture
def task(make_split: MakeSplit) -> Task:
    """Four images: one in two rows of the table, one broken, one without a caption."""
    samples = [
        Sample(near("red", 0), text="a red thing"),
        Sample(near("green", 0), text="some green thing here"),
        Sample(near("red", 0), text="a thing in red"),
        Sample(None, text="a broken thing"),
        Sample(near("blue", 0)),
        Sample(near("grey", 0), text="nothing but grey"),
    ]
    empty = make_split("train", [Sample(near("red", 1))])
    return Task("colours", empty, empty, make_split("test", samples))


def painted(painter: Painter) -> View:
    view = make_view(batch_size=2)
    view.caption = painter
    return view


def test_each_image_is_captioned_once_with_all_of_its_references(task: Task) -> None:
    painter = Painter()
    written = write_captions(painted(painter), task.test, BEAM)
    assert [(one.caption, one.references) for one in written] == [
        ("a red thing", ("a red thing", "a thing in red")),
        ("a green thing", ("some green thing here",)),
        ("a blue thing", ()),
        ("a grey thing", ("nothing but grey",)),
    ]
    assert all(decoding == BEAM for _, decoding in painter.asked)
    assert [count for count, _ in painter.asked] == [2, 1, 2]  # the broken one is left out


def test_results_say_what_they_mean(task: Task) -> None:
    view = painted(Painter())
    written = write_captions(view, task.test, BEAM)
    results = score_captions(view, "colours", task.test, written, BEAM, ("bleu", "cider"))
    used = [one for one in written if one.references]
    expected = caption_scores([o.caption for o in used], [o.references for o in used], ("bleu", "cider"))
    assert [r.metric for r in results] == ["bleu1", "bleu2", "bleu3", "bleu4", "cider"]
    for result, score in zip(results, expected, strict=True):
        assert (result.value, result.low, result.high) == (score.value, score.low, score.high)
        assert result.n == 3 and result.split == "test" and len(result.data) == len(result.preprocess) == 12
        assert "1 with no caption" in result.note
        assert result.extra["decoding"]["how"] == "beam" and result.extra["references"] == 4


def test_the_evaluator_scores_by_every_metric(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    results = evaluate(painted(Painter()), [task], ["captions"])
    assert [r.metric for r in results] == [f"bleu{n}" for n in (1, 2, 3, 4)] + ["rouge_l", "cider", "meteor", "spice"]
    assert [r.value is None for r in results] == [False] * 6 + [True] * 2


def test_weights_without_a_decoder_get_no_number(task: Task) -> None:
    results = evaluate(make_view(), [task], ["captions"])
    assert [r.metric for r in results] == list(METRICS)
    assert all(r.value is None and r.note == "not applicable: these weights write no captions" for r in results)


def test_a_task_without_captions_yields_nothing(make_split: MakeSplit) -> None:
    split = make_split("test", [Sample(near("red", 0))])
    assert evaluate(painted(Painter()), [Task("none", split, split, split)], ["captions"]) == []
