from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from altsight.core.config import from_dict, to_dict
from altsight.core.errors import UserError
from altsight.evals import EVALUATORS, STANDARD, evaluate, find
from altsight.evals.base import Result, Task
from tests.evals.conftest import ColourEncoder, make_view


def test_every_evaluator_is_found() -> None:
    assert all(callable(find(name)) for name in EVALUATORS)


def test_an_unknown_evaluator_is_refused_before_any_work(colours: Task) -> None:
    encoder = ColourEncoder()
    with pytest.raises(UserError, match=r"no evaluator 'linaer'\. Did you mean 'linear'"):
        evaluate(make_view(encoder), [colours], ["knn", "linaer"])
    assert encoder.encoded == 0


def test_all_evaluators_share_one_extraction(colours: Task) -> None:
    encoder, steps = ColourEncoder(), list[str]()
    results = evaluate(make_view(encoder, dual=True), [colours], progress=steps.append)
    assert steps == [f"colours: {name}" for name in STANDARD]
    # Three splits of 24, and the mirrored test images of the alignment meter.
    assert encoder.encoded == 4 * 24
    assert {r.evaluator for r in results} == set(STANDARD)


def test_every_number_says_what_it_means(colours: Task) -> None:
    for r in evaluate(make_view(dual=True), [colours]):
        assert r.value is not None
        assert r.task == "colours" and r.split == "test" and r.feature_point and r.n
        assert len(r.preprocess) == 12 and len(r.data) == 12
        if r.evaluator != "collapse":
            assert r.low is not None and r.high is not None and r.chance is not None
            assert r.low <= r.value <= r.high
            assert ("hits" in r.extra) == (r.metric != "mean_class")


def test_a_view_without_a_text_tower_gets_no_number_for_text(colours: Task) -> None:
    results = evaluate(make_view(), [colours])
    of_text = [r for r in results if r.evaluator in ("zeroshot", "retrieval") or r.metric == "alignment_pairs"]
    assert len(of_text) == 2 + 6 + 1
    assert all(r.value is None and r.note.startswith("not applicable") for r in of_text)
    assert all(r.value is not None for r in results if r not in of_text)


def test_results_survive_json(colours: Task) -> None:
    for r in evaluate(make_view(dual=True), [colours]):
        assert from_dict(json.loads(json.dumps(to_dict(r))), Result, "results.json") == r
        assert json.loads(json.dumps(asdict(r)))["metric"] == r.metric


def test_two_runs_give_the_same_results(colours: Task) -> None:
    assert evaluate(make_view(dual=True), [colours]) == evaluate(make_view(dual=True), [colours])
