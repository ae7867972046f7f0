"""Fine-tuning, probes and kept features as commands, on the folder of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from altsight.cli import run
from altsight.core.config import read_json
from altsight.data.shapes import Shapes
from altsight.nn.encoder import Encoder
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, TrainConfig, default_run
from altsight.transfer.base import prepared_for
from tests.transfer.test_finetune import TINY, folder_of

BATCH = ["--fit.epochs", "2", "--fit.batch", "8", "--fit.workers", "0"]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """The folder of a run of two steps."""
    train = TrainConfig(samples=16, batch=8, precision="fp32")
    tiny = dataclasses.replace(default_run("supervised"), encoder=TINY, train=train, data=DataConfig(workers=0))
    pretrain(tiny, prepared_for(Shapes(16), tmp_path, "shapes"), tmp_path / "run")
    return str(tmp_path / "run")


@pytest.mark.parametrize("name", ["finetune", "linear_probe", "attentive_probe"])
def test_the_command_trains_scores_and_writes_the_results(name: str, weights: str, tmp_path: Path) -> None:
    train, test = folder_of(tmp_path / "train", 6), folder_of(tmp_path / "test", 4, offset=50)
    command = ["transfer", name, weights, "--out", str(tmp_path / "out"), "--data", train, "--test", test, *BATCH]
    assert run(command) == 0
    found = read_json(tmp_path / "out" / "results.json")[weights]
    assert [(r["evaluator"], r["metric"], r["n"]) for r in found] == [(name, "top1", 12), (name, "mean_class", 12)]
    assert all(r["low"] <= r["value"] <= r["high"] and r["data"] and r["preprocess"] for r in found)


def test_wrong_use_ends_with_one_line_and_two(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = folder_of(tmp_path / "train", 6)
    command = ["transfer", "finetune", weights, "--out", str(tmp_path / "out"), "--data", train, "--test", "nowhere"]
    capsys.readouterr()
    assert run(command) == 2
    said = capsys.readouterr().err.strip()
    assert "nowhere" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_eval_keeps_features(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, plan = tmp_path / "kept", tmp_path / "tasks.toml"
    sets = {name: folder_of(tmp_path / name, 8, offset=20 * i) for i, name in enumerate(("train", "val", "test"))}
    lines = "\n".join(f"{name} = '{path}'" for name, path in sets.items())
    plan.write_text(f"[[tasks]]\nname = 'colours'\nlabel = 'label'\n{lines}\n")
    command = ["eval", weights, "--tasks", str(plan), "--features", str(kept), "--out", str(tmp_path / "results.json")]
    assert run([*command, "--evaluators", "knn"]) == 0
    assert len(list(kept.glob("*.safetensors"))) == 2

    def never(*args: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "forward", never)
    assert run([*command, "--evaluators", "knn"]) == 0
    assert read_json(tmp_path / "results.json")[weights][0]["evaluator"] == "knn"
