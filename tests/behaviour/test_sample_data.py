"""What must show on the sample data: training beats not training, and an evaluation that ought to fail does.

The runs are those of the demo, from its plan, at half its budget.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from altsight.core.rng import key
from altsight.data.index import Index
from altsight.data.prepare import Prepared, open_prepared
from altsight.evals import evaluate
from altsight.evals.base import Result
from altsight.evals.bootstrap import hits_of, paired_difference
from altsight.evals.load import load_method, view_of
from altsight.recipes import demo_plan, sample_tasks
from altsight.study.plan import Budget, Plan
from altsight.study.result import UNTRAINED, StudyResult
from altsight.study.run import study
from altsight.train.loop import pretrain
from altsight.train.run import pick_device

METHODS = ("mae", "clip", "mug")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The demo without its reference, at half its budget."""
    demo = demo_plan()
    overrides = {name: demo.overrides[name] for name in METHODS}
    half = Budget(samples=demo.budget.samples // 2)
    return dataclasses.replace(demo, methods=METHODS, references=(), budget=half, overrides=overrides)


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """The study of `plan`."""
    return study(plan, tmp_path_factory.mktemp("behaviour") / "study")


def result(done: StudyResult, arm: str, task: str, evaluator: str, metric: str) -> Result:
    """Return one result of an arm."""
    results = next(a for a in done.arms if a.name == arm).results
    return next(r for r in results if (r.task, r.evaluator, r.metric) == (task, evaluator, metric))


@pytest.mark.parametrize("arm", METHODS)
def test_training_beats_the_untrained_encoder_on_the_linear_probe(done: StudyResult, arm: str) -> None:
    trained = result(done, arm, "emoji", "linear", "top1")
    untrained = result(done, UNTRAINED, "emoji", "linear", "top1")
    difference = paired_difference(hits_of(trained), hits_of(untrained))
    assert difference.low > 0, difference


def test_all_arms_saw_the_same_samples_from_the_same_start(done: StudyResult) -> None:
    trained = [arm for arm in done.arms if arm.summary is not None]
    assert len({arm.summary.sample_hash for arm in trained if arm.summary}) == 1
    assert len({arm.initial_encoder for arm in done.arms}) == 1
    assert len({arm.summary.samples_seen for arm in trained if arm.summary}) == 1


def test_clip_retrieves_and_classifies_by_name(done: StudyResult) -> None:
    for evaluator, metric in (("zeroshot", "mean_class"), ("retrieval", "image_to_text_r10")):
        found = result(done, "clip", "clipart", evaluator, metric)
        assert found.low is not None and found.chance is not None
        assert found.low > found.chance, found


def shuffled(prepared: Prepared) -> Prepared:
    """Return the data with the texts of all samples exchanged at random: real captions, of other images."""
    samples = np.array(prepared.source.index.samples)
    order = key(0, 0, "shuffled captions").generator().permutation(len(samples))
    # A text lies in its own shard, so it is exchanged within the shard.
    for shard in np.unique(samples["shard"]):
        rows = np.flatnonzero(samples["shard"] == shard)
        taken = order[np.isin(order, rows)]
        for field in ("text_at", "text_size", "json_at", "json_size"):
            samples[field][rows] = prepared.source.index.samples[field][taken]
    source = dataclasses.replace(prepared.source, index=Index(prepared.source.index.shards, samples))
    return dataclasses.replace(prepared, source=source)


def test_shuffled_captions_bring_zero_shot_to_chance(done: StudyResult, plan: Plan, tmp_path: Path) -> None:
    """The evaluation can fail: with wrong captions CLIP trains as before and then names nothing."""
    prepared = open_prepared(done.directory / "data")
    run = plan.run("clip", 0, plan.budget.samples)
    pretrain(run, shuffled(prepared), tmp_path)
    _, method = load_method(tmp_path)
    view = view_of(method.to(pick_device("auto")), "shuffled")
    results = evaluate(view, sample_tasks()[:1], ["zeroshot"])
    found = next(r for r in results if r.metric == "mean_class")
    right = result(done, "clip", "clipart", "zeroshot", "mean_class")
    assert found.low is not None and found.high is not None and found.chance is not None and right.low is not None
    assert found.low <= found.chance
    assert found.high < right.low or (found.value or 0) < (right.value or 0) / 2
