"""A whole study at toy size: fair, resumable, and the same after an interruption as without."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import altsight_samples
import numpy as np
import pytest
from PIL import Image

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import open_prepared
from altsight.evals import evaluate
from altsight.nn.encoder import EncoderConfig
from altsight.study import run as study_run
from altsight.study.budget import resolve
from altsight.study.certificate import certify
from altsight.study.pairs import data_of
from altsight.study.plan import Budget, Plan, SourceConfig
from altsight.study.result import load_study
from altsight.study.run import study
from altsight.study.tasks import TaskConfig
from altsight.train.loop import Stopped
from altsight.train.run import DataConfig, TrainConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
TEXT = {"width": 32, "heads": 2, "layers": 1, "context": 8}


def write_shard(folder: Path, samples: int, seed: int) -> str:
    """Write `samples` noisy pictures of one colour each, with caption and label; return the folder."""
    folder.mkdir()
    noise = np.random.default_rng(seed)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(samples):
            name = list(COLOURS)[i % len(COLOURS)]
            pixels = np.clip(np.array(COLOURS[name]) + noise.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            parts = {"png": buffer.getvalue(), "txt": f"a {name} picture".encode()}
            parts["json"] = json.dumps({"colour": name}).encode()
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two methods, 64 samples, an encoder of width 32 and depth 1."""
    home = tmp_path_factory.mktemp("toy")
    train = write_shard(home / "train", 64, 0)
    val, test = write_shard(home / "val", 12, 1), write_shard(home / "test", 12, 2)
    return Plan(
        name="toy",
        methods=("mae", "clip"),
        budget=Budget(samples=70),
        source=SourceConfig(train, label="colour", vocab_size=300),
        tasks=(TaskConfig("colours", train, val, test, label="colour"),),
        encoder=EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2),
        train=TrainConfig(batch=16, device="cpu", precision="fp32"),
        overrides={
            "mae": {"method": {"decoder": {"width": 32, "depth": 1, "heads": 2}}, "data": {"workers": 0}},
            "clip": {"method": {"text": TEXT, "embed_dim": 16}, "data": {"workers": 0}},
        },
    )


@pytest.fixture(scope="module")
def done(toy: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the toy study, run to its end."""
    folder = tmp_path_factory.mktemp("done") / "study"
    study(toy, folder)
    return folder


def numbers(folder: Path) -> list[Any]:
    """Return all that must not depend on interruptions."""
    return [
        (arm.name, arm.initial_encoder, arm.results, arm.summary and (arm.summary.sample_hash, arm.summary.final_loss))
        for arm in load_study(folder).arms
    ]


def test_the_study_is_fair_and_complete(done: Path) -> None:
    result = load_study(done)
    assert [arm.name for arm in result.arms] == ["untrained", "mae", "clip"]
    assert result.samples == {"mae": 64, "clip": 64}
    certificate = certify(result)
    assert not certificate.unexplained
    assert len(certificate.same) == 3
    assert result.arms[2].modules["text"] > 0
    html = (done / "report.html").read_text(encoding="utf-8")
    assert "mae rebuilds" in html and "clip: text to images" in html


def test_running_again_trains_and_evaluates_nothing(toy: Plan, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to evaluate")

    monkeypatch.setattr(study_run, "evaluate", refuse)
    before = numbers(done)
    logs = {path: path.stat().st_mtime_ns for path in done.glob("arms/*/*/log.jsonl")}
    study(toy, done)
    assert numbers(done) == before
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_goes_on_after_signals_in_training_and_in_evaluation(
    toy: Plan, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    probe = study_run._probe

    def interrupted_probe(view: Any, task: Any) -> dict[str, float]:
        if view.name == "clip":
            os.kill(os.getpid(), signal.SIGINT)
        return probe(view, task)

    def interrupted_evaluate(view: Any, tasks: Any, *names: Any, **options: Any) -> Any:
        if view.name == "clip" and not names:
            raise KeyboardInterrupt
        return evaluate(view, tasks, *names, **options)

    monkeypatch.setattr(study_run, "_probe", interrupted_probe)
    with pytest.raises(Stopped):
        study(toy, folder)
    assert [arm.name for arm in load_study(folder).arms] == ["untrained", "mae"]
    monkeypatch.setattr(study_run, "_probe", probe)
    monkeypatch.setattr(study_run, "evaluate", interrupted_evaluate)
    with pytest.raises(KeyboardInterrupt):
        study(toy, folder)
    assert (folder / "arms/clip/seed_0/summary.json").exists()
    assert not (folder / "arms/clip/seed_0/results.json").exists()
    monkeypatch.setattr(study_run, "evaluate", evaluate)
    study(toy, folder)
    assert numbers(folder) == numbers(done)


def test_another_plan_in_the_same_folder_is_refused(toy: Plan, done: Path) -> None:
    with pytest.raises(UserError, match="holds the study of another plan"):
        study(dataclasses.replace(toy, seeds=(1,)), done)


def test_an_arm_that_cannot_be_built_stops_the_study_before_training(toy: Plan, tmp_path: Path) -> None:
    source = dataclasses.replace(toy.source or SourceConfig(""), images_only=True)
    with pytest.raises(UserError, match="clip learns from text"):
        study(dataclasses.replace(toy, source=source), tmp_path / "study")
    assert not (tmp_path / "study" / "arms").exists()


def test_a_budget_in_flops_gives_the_cheaper_method_more_samples(toy: Plan, done: Path, tmp_path: Path) -> None:
    prepared = open_prepared(done / "data")
    plan = dataclasses.replace(toy, budget=Budget(flops=1e9))
    found = resolve(plan, prepared, tmp_path)
    cost = {arm: found.measured[arm]["flops_per_sample"] for arm in plan.arms}
    assert found.samples == {arm: int(1e9 / cost[arm]) // 16 * 16 for arm in plan.arms}
    assert cost["mae"] != cost["clip"]
    # A resume reads what was resolved, whatever a second measurement would say.
    again = resolve(dataclasses.replace(plan, budget=Budget(flops=9e9)), prepared, tmp_path)
    assert again == found


def test_a_budget_in_minutes_is_measured_and_kept(toy: Plan, done: Path, tmp_path: Path) -> None:
    prepared = open_prepared(done / "data")
    overrides = {"mae": toy.overrides["mae"]}
    plan = dataclasses.replace(toy, methods=("mae",), overrides=overrides, budget=Budget(minutes=1.0))
    found = resolve(plan, prepared, tmp_path)
    rate = found.measured["mae"]["samples_per_second"]
    assert found.samples["mae"] == int(60 * rate) // 16 * 16 > 0
    assert not (tmp_path / "speed" / "mae").exists()
    assert resolve(plan, prepared, tmp_path) == found


def test_a_budget_below_one_batch_is_refused(toy: Plan, done: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(toy, budget=Budget(flops=10.0))
    with pytest.raises(UserError, match=r"budget\.flops: 10 pays for 0\.0 samples of mae"):
        resolve(plan, open_prepared(done / "data"), tmp_path)
    assert not (tmp_path / "budget.json").exists()


def test_arms_that_learn_from_pairs_see_the_same_documents(toy: Plan, done: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(str(altsight_samples.documents()), tmp_path / "data", vocab_size=300))
    documents = open_prepared(tmp_path / "data")
    clip = toy.overrides["clip"]
    plan = dataclasses.replace(
        toy,
        methods=("clip", "paired"),
        variants={"paired": "clip"},
        pairs=("paired",),
        source=None,
        data=DataConfig(str(tmp_path / "data"), workers=0),
        overrides={"clip": clip, "paired": clip},
    )
    pairs = data_of(plan, "paired", documents)
    assert data_of(plan, "clip", documents) is documents and pairs.hash() != documents.hash()
    at = key(0, 0, "document")
    assert len(pairs.source.document(0, at).parts) == 2 < len(documents.source.document(0, at).parts)
    study(plan, tmp_path / "study")
    first, second = load_study(tmp_path / "study").arms[1:]
    assert first.summary and second.summary
    assert first.summary.sample_hash == second.summary.sample_hash
    assert first.summary.final_loss != second.summary.final_loss
    with pytest.raises(UserError, match="holds no interleaved documents of which paired"):
        data_of(plan, "paired", open_prepared(done / "data"))
