"""SLIP beside CLIP at equal samples on the sample clip art: which one's features a linear probe reads better.

SLIP's claim (Mu et al. 2022) is about millions of images. A run of minutes need not bear it out, so what is found is
printed with its interval (`pytest -rP`), and asserted is what must hold whichever is better. A sample costs SLIP three
passes of the encoder where it costs CLIP one. About ten minutes on a core of its own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from altsight import recipes
from altsight.core.config import merge, read_json
from altsight.evals import evaluate
from altsight.evals.base import Result, View
from altsight.evals.bootstrap import Interval, hits_of, interval, paired_difference
from altsight.evals.load import load_method, view_of
from altsight.methods.base import Corpus
from altsight.study.plan import Plan, read_plan
from altsight.study.run import open_data
from altsight.study.tasks import open_tasks
from altsight.train.loop import pretrain
from altsight.train.run import build, pick_device

pytestmark = pytest.mark.slow
SAMPLES = 15_360
"""Seen by each run: two thirds of the demo's."""
SEEDS = (0, 1)
ARMS = ("clip", "slip")
Hits = dict[str, npt.NDArray[np.bool_]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slip")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The demo's plan for two cores at half the side of its images; SLIP gets CLIP's settings and a smaller head."""
    demo = read_plan(Path(recipes.__file__).with_name("demo_cpu.toml"))
    clip = demo.overrides["clip"]
    slip = merge(clip, {"method": {"hidden": 512, "out_dim": 128}})
    encoder = dataclasses.replace(demo.encoder, img_size=32)
    arms = {"methods": ARMS, "references": (), "overrides": {"clip": clip, "slip": slip}}
    return dataclasses.replace(demo, encoder=encoder, seeds=SEEDS, **arms)


def probe(view: View, plan: Plan) -> list[Result]:
    """Return the linear probe on the emoji; val and test change places once, so it is tested on twice the items."""
    emoji = open_tasks(plan.tasks)[1]
    swapped = dataclasses.replace(emoji, name="emoji swapped", val=emoji.test, test=emoji.val)
    return evaluate(view, [emoji, swapped], ["linear"])


@pytest.fixture(scope="module")
def found(plan: Plan, folder: Path) -> dict[tuple[str, int], list[Result]]:
    """Results of the probe by arm and seed; "untrained" is the encoder that both arms start from."""
    prepared = open_data(plan, folder)
    device = pick_device("auto")
    results = {}
    for seed in plan.seeds:
        for arm in plan.arms:
            pretrain(plan.run(arm, seed, SAMPLES), prepared, folder / f"{arm}{seed}")
            results[arm, seed] = probe(view_of(load_method(folder / f"{arm}{seed}")[1].to(device), arm), plan)
        start = build(plan.run("clip", seed, SAMPLES), Corpus(prepared.tokenizer, prepared.classes))
        results["untrained", seed] = probe(view_of(start.to(device), "untrained"), plan)
    return results


@pytest.fixture(scope="module")
def hits(found: dict[tuple[str, int], list[Result]]) -> Hits:
    """Arm -> whether each item was right, under one seed after the other."""
    arms = dict.fromkeys(arm for arm, _ in found)
    return {arm: np.concatenate([hits_of(r) for seed in SEEDS for r in found[arm, seed]]) for arm in arms}


def items(hits: Hits) -> npt.NDArray[np.int64]:
    """The id of every item: the seeds are tested on the same ones, which are drawn together."""
    return np.tile(np.arange(len(hits["clip"]) // len(SEEDS)), len(SEEDS))


def percent(found: Interval) -> list[float]:
    return [round(100 * x, 1) for x in (found.value, found.low, found.high)]


def test_both_saw_the_same_samples_from_the_same_start(found: object, folder: Path) -> None:
    for seed in SEEDS:
        summaries = [read_json(folder / f"{arm}{seed}" / "summary.json") for arm in ARMS]
        for fact in ("sample_hash", "initial_encoder", "samples_seen", "data"):
            assert summaries[0][fact] == summaries[1][fact], fact
        # Three passes of the encoder, and the views' head, against one pass; both have the same text tower.
        assert 2 < summaries[1]["flops"] / summaries[0]["flops"] < 3.5


@pytest.mark.parametrize("arm", ARMS)
def test_beats_chance_and_the_untrained_encoder(
    found: dict[tuple[str, int], list[Result]], hits: Hits, arm: str
) -> None:
    for seed in SEEDS:
        for result in found[arm, seed]:
            assert result.low is not None and result.chance is not None and result.low > result.chance, result
    difference = paired_difference(hits[arm], hits["untrained"], items(hits))
    assert difference.low > 0, difference


def test_which_is_better_is_reported(hits: Hits, record_property: pytest.RecordProperty) -> None:
    """Prints accuracies and their paired difference in percent, [value, low, high], and what they allow to be said."""
    difference = paired_difference(hits["slip"], hits["clip"], items(hits))
    report: dict[str, object] = {arm: percent(interval(right, items(hits))) for arm, right in hits.items()}
    report["slip - clip"] = percent(difference)
    report["better"] = "slip" if difference.low > 0 else "clip" if difference.high < 0 else "neither, at this size"
    for name, value in report.items():
        record_property(name, value)
    print(json.dumps(report))
    assert difference.low <= difference.value <= difference.high
