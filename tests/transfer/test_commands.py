"""Every transfer by its command: what it prints and writes, what each number carries, and on two ranks the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import altsight
from altsight.cli import run
from altsight.core.config import read_json
from altsight.data.canvas import write_canvases
from altsight.data.clips import write_moving
from altsight.data.scenes import Scenes, write_ade20k, write_coco
from altsight.data.shapes import Shapes
from altsight.data.stamps import stamps_of
from altsight.nn.resample import resized
from altsight.train.log import read_log
from altsight.transfer import TRANSFERS
from altsight.transfer.base import with_view
from tests.toy import toy_clip, write_toy_run

ROOT = Path(__file__).parents[2]
FAST = ["--fit.precision", "fp32", "--fit.workers", "0", "--fit.device", "cpu"]
"""In fp32, so that the losses of one and two ranks can be compared."""


def write_shapes(folder: Path, count: int, seed: int) -> None:
    """Write pictures of shapes into class folders, and a table with their captions."""
    source = Shapes(count, seed)
    lines = []
    for i in range(count):
        label = source.fields(i)["label"]
        path = folder / "folders" / label / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.image(i))
        lines.append({"image": str(path), "text": source.all_captions(i)[0]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's run and a small data set for every task."""
    home = tmp_path_factory.mktemp("made")
    write_toy_run(home / "toy")
    write_shapes(home / "train", 96, 0)
    write_shapes(home / "test", 64, 1)
    write_ade20k(home / "ade", Scenes(8, 0, pixels=64), Scenes(4, 1, pixels=64))
    write_coco(home / "coco", Scenes(8, 0, pixels=64), Scenes(4, 1, pixels=64))
    write_moving(home / "videos", ["fox", "whale"], 3, by="object", pixels=32, frames=8)
    drawings = {name: [stamp.sized(24) for stamp in found] for name, found in zip(NAMES, stamps_of(NAMES), strict=True)}
    write_canvases(home / "slides", drawings, 2, 256, 3, 32)
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(home / "black.png")
    return home


NAMES = ("fox", "whale")


def settings(name: str, made: Path) -> list[str]:
    """Return the settings of a training of seconds."""
    folders = ["--data", str(made / "train/folders"), "--test", str(made / "test/folders")]
    short = ["--fit.epochs", "1", "--fit.batch", "32", *FAST]
    small = ["--fit.epochs", "1", "--fit.batch", "4", *FAST, "--size", "64"]
    return {
        "finetune": [*folders, *short],
        "linear_probe": [*folders, *short],
        "attentive_probe": [*folders, *short],
        "segment": ["--data", str(made / "ade"), *small, "--channels", "16"],
        "denseclip": ["--data", str(made / "ade"), *small, "--channels", "16", "--room", "12"],
        "detect": [
            *("--data", str(made / "coco"), *small, "--detector.width", "16", "--detector.hidden", "32"),
            *("--detector.proposals", "50"),
        ],
        "caption": [
            *("--data", str(made / "train/captions.jsonl"), "--test", str(made / "test/captions.jsonl")),
            *("--captions", "{text}", "--size.width", "32", "--size.layers", "1", "--size.heads", "2"),
            *("--vocab-size", "300", "--decoding.beams", "1", "--length", "12", "--metrics", "cider"),
            *short,
        ],
        "video": [
            *("--data", str(made / "videos"), "--test", str(made / "videos"), "--frames", "4", "--shorter", "32"),
            *(
                "--fit.epochs",
                "2",
                "--fit.batch",
                "4",
                *FAST,
                "--temporal.kind",
                "transformer",
                "--temporal.heads",
                "4",
            ),
        ],
        "slides": [
            *("--data", str(made / "slides"), "--classes", str(made / "slides/classes.txt")),
            *("--sets", "4", "--tiles.tile", "32", "--topk", "1", "3"),
        ],
        "selftrain": [*folders, *short, "--must.mask-block", "8", "--prompts", "a picture of a {}"],
    }[name]


def transfer(name: str, made: Path, out: Path, extra: Sequence[str] = ()) -> int:
    return run(["transfer", name, str(made / "toy"), "--out", str(out), *settings(name, made), *extra])


@pytest.mark.parametrize("name", TRANSFERS)
def test_every_number_tells_what_it_is(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer(name, made, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    ((weights, results),) = read_json(tmp_path / "out" / "results.json").items()
    assert weights == str(made / "toy") and any(result["value"] is not None for result in results)
    for result in results:
        assert result["metric"].split()[0][:5] in printed
        if result["value"] is None:
            assert result["note"].startswith("not applicable")
            continue
        assert np.isfinite(result["value"])
        for field in ("task", "evaluator", "split", "feature_point", "preprocess", "data"):
            assert result[field], field
        assert result["n"] > 0 and "seed" in result["extra"]
        assert (result["low"] is not None and result["low"] <= result["value"] <= result["high"]) or result["note"]


@pytest.mark.parametrize("name", ["finetune", "segment", "denseclip", "detect", "selftrain"])
def test_the_tuned_encoder_is_left_as_weights(name: str, made: Path, tmp_path: Path) -> None:
    assert transfer(name, made, tmp_path) == 0
    tuned, original = altsight.load(tmp_path / "encoder.safetensors"), toy_clip()
    images = torch.stack([tuned.preprocess(Shapes(4).image(i)) for i in range(4)])
    resized_alike = with_view(original, resized(original.encoder, img_size=tuned.preprocess.size))
    assert not torch.allclose(tuned.features(images), resized_alike.features(images), atol=1e-4)


@pytest.mark.parametrize("name", TRANSFERS)
def test_the_help_names_the_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(["transfer", name, "--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "--out" in printed and "--data" in printed
    text = TRANSFERS[name][1]
    assert " ".join(printed.split()).find(text[0].upper() + text[1:].split(" (")[0]) > 0


def test_without_a_name_the_transfers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transfer", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TRANSFERS)
    assert run(["transfer"]) == 2


def test_wrong_names_get_a_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transfer", "segmnt", str(made / "toy"), "--out", str(tmp_path)]) == 2
    assert "Did you mean 'segment'?" in capsys.readouterr().err
    out = tmp_path / "out"
    arguments = ["--out", str(out), *settings("slides", made)]
    assert run(["transfer", "slides", str(made / "nowhere"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("altsight: ") and message.count("\n") == 1 and "nowhere" in message
    assert not out.exists()


TRAINED = [name for name in TRANSFERS if name != "slides"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
def test_two_ranks_find_what_one_does(name: str, made: Path, tmp_path: Path) -> None:
    """Under torchrun: the same samples, losses equal to rounding, the same numbers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for ranks, launcher in ((1, []), (2, torchrun)):
        command = [sys.executable, *launcher, "-m", "tests.transfer.without_draws", "transfer", name, str(made / "toy")]
        command += ["--out", str(tmp_path / str(ranks)), *settings(name, made)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (_results(tmp_path / ranks) for ranks in ("1", "2"))
    assert [(r["metric"], r["n"], r["data"]) for r in one] == [(r["metric"], r["n"], r["data"]) for r in two]
    if name in TRAINED:
        first, second = (read_json(tmp_path / ranks / "summary.json") for ranks in ("1", "2"))
        assert first["world_size"] == 1 and second["world_size"] == 2
        assert first["sample_hash"] == second["sample_hash"]
        first, second = (read_log(tmp_path / ranks) for ranks in ("1", "2"))
        assert [x["loss"] for x in second] == pytest.approx([x["loss"] for x in first], rel=1e-3)
    else:
        assert [r["value"] for r in one] == pytest.approx([r["value"] for r in two], rel=1e-5)


def _results(out: Path) -> list[dict[str, Any]]:
    ((_, results),) = read_json(out / "results.json").items()
    found: list[dict[str, Any]] = results
    return found
