"""`altsight eval` on every kind of task, as a user gives it: files on disk, one command, one sentence for a mistake."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from altsight.cli import run
from altsight.commands.study import print_results
from altsight.data.prepared import open_prepared
from altsight.evals import corrupted, fewshot
from altsight.evals.base import Result
from altsight.train.loop import pretrain
from tests.contract.tiny import tiny_run
from tests.test_cli import fails
from tests.toy import write_toy_run

COLOURS = {"n01": (230, 30, 30), "n02": (30, 200, 40), "n03": (40, 40, 220)}
TASKS = """
[[tasks]]
name = "clean"
train = "train"
val = "val"
test = "test"
label = "label"
classes = "names.json"
templates = "prompts.txt"
group = "natural"

[[tasks]]
name = "shifted"
test = "shifted"
label = "label"
classes = "names.json"
subset = "subset.txt"
clean = "clean"
trim = 1

[[tasks]]
name = "pictures"
test = "captions.jsonl"
caption_prompt = "a photo of {}"
ratings = ["sits.csv"]
image_id = "path"

[[tasks]]
name = "winoground"
winoground = "winoground"

[[tasks]]
name = "sugarcrepe"
sugarcrepe = "sugarcrepe"
images = "test/n01"
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_run(tmp_path_factory.mktemp("runs") / "clip"))


@pytest.fixture(scope="module")
def mae(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs") / "mae"
    pretrain(tiny_run("mae", sample_path, 64), open_prepared(sample_path), out)
    return str(out)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of classes, a table with captions and ratings, and both layouts of compositional pairs."""
    monkeypatch.setattr(corrupted, "SIDE", 16)
    monkeypatch.setattr(corrupted, "SEVERITIES", (1, 5))
    monkeypatch.setattr(fewshot, "DRAWS", 1)
    for split, count in (("train", 6), ("val", 3), ("test", 3), ("shifted", 2)):
        for label, (r, g, b) in COLOURS.items():
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), (r, (g + 9 * i) % 256, b)).save(tmp_path / split / label / f"{i}.png")
    names = {"n01": "red card", "n02": "green card", "n03": "blue card"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\nart of the {}.\n")
    (tmp_path / "subset.txt").write_text("red card\nn02\n")
    rows = [{"path": f"test/{n}/{i}.png", "caption": f"{name} {i}"} for n, name in names.items() for i in (0, 1)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "sits.csv").write_text(
        "caption,image,agg_score,sampling_method\nred card 0,test/n01/1.png,4.5,x\nblue card 1,test/n01/0.png,0.5,x\n"
    )
    (tmp_path / "winoground" / "images").mkdir(parents=True)
    for label, colour in COLOURS.items():
        Image.new("RGB", (40, 36), colour).save(tmp_path / "winoground" / "images" / f"{label}.png")
    row = {"id": 0, "caption_0": "red on green", "caption_1": "green on red", "image_0": "n01", "image_1": "n02"}
    (tmp_path / "winoground" / "examples.jsonl").write_text(json.dumps(row))
    (tmp_path / "sugarcrepe").mkdir()
    pair = {"filename": "0.png", "caption": "a red card", "negative_caption": "a red cat"}
    for subset in ("swap_obj", "add_att"):
        (tmp_path / "sugarcrepe" / f"{subset}.json").write_text(json.dumps({"0": pair}))
    (tmp_path / "tasks.toml").write_text(TASKS)
    return tmp_path


def evaluate(data: Path, weights: list[str], *options: str) -> dict[str, list[dict[str, Any]]]:
    out = data / "results.json"
    assert run(["eval", *weights, "--out", str(out), *options]) == 0
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


def test_every_kind_of_task_in_one_command(data: Path, clip: str, mae: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("zeroshot", "retrieval", "rated", "compositional", "robustness", "corruptions", "fewshot")
    found = evaluate(data, [clip, mae], "--tasks", str(data / "tasks.toml"), "--evaluators", *names)
    for results in found.values():
        kinds = {(r["task"], r["evaluator"]) for r in results}
        assert {("clean", "corruptions"), ("shifted", "robustness"), ("clean", "fewshot")} <= kinds
        assert {("winoground", "compositional"), ("sugarcrepe", "compositional"), ("pictures", "rated")} <= kinds
        assert ("all tasks", "fewshot") in kinds
    of_clip, of_mae = found[clip], found[mae]
    for r in of_clip:
        assert r["value"] is not None and r["low"] <= r["value"] <= r["high"] and r["n"]
        assert r["split"] and r["feature_point"] and len(r["preprocess"]) == len(r["data"]) == 12
        assert "seed" in r["extra"], r["metric"]
    absent = {(r["task"], r["evaluator"]) for r in of_mae if r["value"] is None}
    assert absent - {("shifted", "corruptions")} == {
        *(("clean", "zeroshot"), ("shifted", "zeroshot"), ("pictures", "retrieval"), ("pictures", "rated")),
        *(("winoground", "compositional"), ("sugarcrepe", "compositional")),
    }
    top1 = next(r for r in of_clip if (r["task"], r["metric"], r["evaluator"]) == ("clean", "top1", "zeroshot"))
    assert top1["extra"]["prompts"] == ["a photo of a {}.", "art of the {}."] and top1["n"] == 9
    mask = next(r for r in of_clip if (r["task"], r["metric"], r["evaluator"]) == ("shifted", "top1", "zeroshot"))
    assert mask["n"] == 4 and mask["chance"] == 0.5
    recall = next(r for r in of_clip if (r["task"], r["evaluator"]) == ("pictures", "retrieval"))
    assert recall["extra"]["caption_prompt"] == "a photo of {}"
    assert "corruptions" in capsys.readouterr().out


def test_a_folder_is_classified_without_a_file_of_tasks(data: Path, clip: str) -> None:
    options = ("--classes", str(data / "names.json"), "--templates", str(data / "prompts.txt"))
    found = evaluate(data, [clip], "--data", str(data / "test"), *options, "--evaluators", "zeroshot")
    metrics = {r["metric"]: r for r in found[clip]}
    assert list(metrics) == ["top1", "mean_class"] and metrics["top1"]["task"] == "test" and metrics["top1"]["n"] == 9
    standard = evaluate(data, [clip], "--data", str(data / "test"))
    assert {r["evaluator"] for r in standard[clip]} == {"zeroshot", "collapse"}


def test_two_runs_agree_to_the_bit(data: Path, clip: str) -> None:
    options = ("--tasks", str(data / "tasks.toml"), "--evaluators", "corruptions", "robustness")
    assert evaluate(data, [clip], *options) == evaluate(data, [clip], *options)


def test_a_baseline_is_a_former_result(data: Path, clip: str) -> None:
    evaluate(data, [clip], "--tasks", str(data / "tasks.toml"), "--evaluators", "corruptions")
    found = json.loads((data / "results.json").read_text())
    for r in found[clip]:
        r["value"] = max(r["value"], 0.01)
    (data / "baseline.json").write_text(json.dumps(found))
    (data / "tasks.toml").write_text(TASKS.replace('group = "natural"', 'baseline = "baseline.json"'))
    again = evaluate(data, [clip], "--tasks", str(data / "tasks.toml"), "--evaluators", "corruptions")
    mce = next(r for r in again[clip] if r["metric"] == "mce" and r["task"] == "clean")
    assert 0 <= mce["value"] <= 1


def test_mistakes_are_one_sentence(data: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, folder, out = str(data / "tasks.toml"), str(data / "test"), data / "no.json"
    asked = ["eval", clip, "--out", str(out)]
    fails(capsys, ["eval"], "no weights to evaluate")
    fails(capsys, [*asked, "--tasks", tasks, "--evaluators", "zerosot"], "Did you mean 'zeroshot'")
    fails(capsys, [*asked, "--tasks", str(data / "no.toml")], "no.toml", "cannot be read")
    fails(capsys, [*asked, "--tasks", tasks, "--data", folder], "not both")
    fails(capsys, [*asked, "--classes", "x.txt"], "--classes is about --data")
    fails(capsys, [*asked, "--data", str(data / "nowhere")], "nowhere")
    fails(capsys, [*asked, "--data", folder, "--classes", str(data / "no.txt")], "no.txt", "cannot be read")
    fails(capsys, [*asked, "--data", folder, "--templates", "imagnet"], "imagnet")
    fails(capsys, [*asked, "--data", folder, "--evaluators", "knn"], "nothing to measure for knn")
    (data / "file").write_text("")
    for wrong in (data / "file" / "no.json", data / "test"):
        fails(capsys, ["eval", clip, "--data", folder, "--out", str(wrong)], "cannot be written to")
    (data / "twice.txt").write_text("owl\nowl\ntit")
    fails(capsys, [*asked, "--data", folder, "--classes", str(data / "twice.txt")], "names two labels 'owl'")
    (data / "few.txt").write_text("owl\ntit")
    fails(capsys, [*asked, "--data", folder, "--classes", str(data / "few.txt")], "2 names for 3 labels")
    fails(capsys, [*asked, "--data", folder, "--subset", "imagenet-r"], "imagenet-r", "no class")
    assert not out.exists()


def test_zero_shot_without_a_text_tower(mae: str, clip: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--data", str(data / "test"), "--evaluators", "zeroshot"]
    fails(capsys, ["eval", mae, *asked], "zeroshot cannot be measured", "no text tower")
    # Beside weights that have one it is a row of the table; what the tasks do not allow is said below.
    out = data / "new" / "results.json"
    assert run(["eval", mae, clip, *asked, "robustness", "--out", str(out)]) == 0 and out.exists()
    assert "n/a" in (shown := capsys.readouterr().out) and "nothing to measure for robustness" in shown


def test_no_number_is_cut_off_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = Result(
        "samples:emoji/test", "attentive_probe", "top1 of half the classes", 0.5, 0.25, 0.75, 0.125, note="a note"
    )
    print_results({"runs/clip": [asdict(found)]})
    printed = capsys.readouterr().out
    assert "0.5000 [0.2500, 0.7500]" in printed and "0.1250" in printed and "\u2026" not in printed
    assert max(map(len, printed.splitlines())) <= 80
