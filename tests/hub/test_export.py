"""Exports: another library loads them, computes the same, and runs the very code that the model card shows."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import altsight
from altsight.cli import run as altsight_command
from altsight.core.errors import UserError
from altsight.data.prepared import Prepared
from altsight.hub import export as export_module
from altsight.hub.export import FORMATS, Exported, export
from altsight.train.loop import pretrain
from tests.contract.tiny import tiny_run

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_run(sample_data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run of clip."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    run = tiny_run("clip", sample_data.directory, 64, batch=32)
    # OpenCLIP has one activation for both towers.
    run = dataclasses.replace(run, encoder=dataclasses.replace(run.encoder, quick_gelu=True))
    pretrain(run, sample_data, folder)
    return folder


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    """Return a file of random weights of a small ViT under timm's names."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.mark.parametrize("to", ["timm", "onnx", "safetensors"])
def test_a_single_encoder(vit_file: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    done = export(str(vit_file), to, out)
    assert done.differences and max(done.differences.values()) <= 1e-5
    assert "a plain ViT" in (out / "README.md").read_text()
    if to != "onnx":
        before, after = altsight.load(vit_file), altsight.load(out)
        assert (before.features(PIXELS) - after.features(PIXELS)).abs().max() <= 1e-6
        assert before.preprocess == after.preprocess and before.feature_point == after.feature_point


@pytest.fixture(scope="module")
def exported(clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Return the exports of the run in every format, with the same results for their cards."""
    folder = tmp_path_factory.mktemp("exported")
    row = {"task": "emoji", "evaluator": "knn", "metric": "top-1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    (folder / "results.json").write_text(json.dumps({"run": [row | {"split": "test"}]}))
    return {to: export(str(clip_run), to, folder / to, results=folder / "results.json") for to in FORMATS}


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_in_every_format(clip_run: Path, exported: dict[str, Exported], to: str) -> None:
    done = exported[to]
    assert max(done.differences.values()) <= 1e-5
    card = (done.folder / "README.md").read_text()
    assert "method `clip`" in card and "[0.4, 0.6]" in card and '"name": "clip"' in card and "| data hash |" in card
    behind = "left behind" if to in ("timm", "safetensors") else "a text tower in the same space"
    assert f"| text | {behind}" in card
    if to in ("openclip", "huggingface"):
        before, after = altsight.load(clip_run), altsight.load(done.folder)
        assert (before.encode_text(["a dog"]) - after.encode_text(["a dog"])).abs().max() <= 1e-5
        assert (before.encode_image(PIXELS) - after.encode_image(PIXELS)).abs().max() <= 1e-5


def test_the_code_of_every_model_card_runs(exported: dict[str, Exported], tmp_path: Path) -> None:
    """All in one process, which imports the libraries once, but each in a namespace of its own."""
    for to, done in exported.items():
        code = re.findall(r"```python\n(.*?)```", (done.folder / "README.md").read_text(), re.DOTALL)
        assert [block.strip() for block in code] == [done.usage.strip()]
        (tmp_path / f"{to}.txt").write_text(code[0])
    run = "import pathlib\nfor p in sorted(pathlib.Path('.').glob('*.txt')): exec(p.read_text(), {})\nprint('done')"
    called = [sys.executable, "-W", "ignore", "-c", run]
    done_all = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done_all.returncode == 0 and done_all.stdout.endswith("done\n"), done_all.stderr


def test_timm_reads_the_features_of_the_run_with_its_own_head(clip_run: Path, exported: dict[str, Exported]) -> None:
    view = altsight.load(clip_run)
    model = timm.create_model(f"local-dir:{exported['timm'].folder}", pretrained=True).eval()
    with torch.no_grad():
        assert (model(view.encoder.normalize(PIXELS)) - view.features(PIXELS)).abs().max() <= 1e-5
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, view.preprocess.size, view.preprocess.size)
    assert config["crop_pct"] == 1.0 and tuple(config["mean"]) == (0.485, 0.456, 0.406)


def test_another_size(vit_file: Path, tmp_path: Path) -> None:
    export(str(vit_file), "timm", tmp_path / "out", img_size=48)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)(torch.zeros(1, 3, 48, 48)).ndim == 2


def test_an_export_that_computes_something_else_leaves_nothing(
    vit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from altsight.hub import own

    monkeypatch.setattr(own, "compare", lambda view, folder: {"features": 2e-4})
    with pytest.raises(UserError, match=r"safetensors computes other features .*differ by 0.0002"):
        export(str(vit_file), "safetensors", tmp_path / "out")
    monkeypatch.setattr(own, "compare", lambda view, folder: {"features": float("nan")})
    with pytest.raises(UserError, match="nothing was written"):
        export(str(vit_file), "safetensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.pth"]


def test_a_changed_weight_in_the_export_is_noticed(vit_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from altsight.hub import timm_write

    written = timm_write.save_file

    def spoiled(state: dict[str, torch.Tensor], path: Path) -> None:
        written({name: value + 0.01 * name.endswith("norm.bias") for name, value in state.items()}, path)

    monkeypatch.setattr(timm_write, "save_file", spoiled)
    with pytest.raises(UserError, match="timm computes other"):
        export(str(vit_file), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_refused_in_one_line(vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format 'tim'"):
        export_module.export(str(vit_file), "tim", tmp_path / "out")
    with pytest.raises(UserError, match="no text tower"):
        export(str(vit_file), "openclip", tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        export(str(vit_file), "timm", tmp_path)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results"):
        export(str(vit_file), "timm", tmp_path / "out", results=tmp_path / "r.json")
    row = {"metric": "top-1", "value": 0.5}
    for content in ([row], "x", {"run": [row | {"value": "high"}]}):
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="holds no results"):
            export(str(vit_file), "timm", tmp_path / "out", results=tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps({"a": [row], "b": [row]}))
    with pytest.raises(UserError, match="holds results of a, b, and none of"):
        export(str(vit_file), "timm", tmp_path / "out", results=tmp_path / "r.json")
    assert not (tmp_path / "out").exists()


def test_a_card_has_the_numbers_of_its_own_weights(vit_file: Path, tmp_path: Path) -> None:
    found = {name: [{"metric": "top-1", "value": value}] for name, value in ((str(vit_file), 0.25), ("other", 0.75))}
    (tmp_path / "r.json").write_text(json.dumps(found))
    export(str(vit_file), "safetensors", tmp_path / "out", results=tmp_path / "r.json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0.25 |" in card and "0.75" not in card


def test_the_commands(vit_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert altsight_command(["load", str(vit_file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["feature_point"] == "cls" and said["patches"] == "4 x 4" and said["left_over"] == []
    assert altsight_command(["load", str(vit_file)]) == 0
    assert "a plain ViT" in capsys.readouterr().out
    assert altsight_command(["export", str(vit_file), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "differ by 0 at most" in printed.err and "timm.create_model" in printed.out
    assert altsight_command(["load", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
