"""CLIP_benchmark's own command line runs our weights on a local task, and finds our numbers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from altsight.core.errors import UserError
from altsight.data.shapes import CLASSES, Shapes
from altsight.evals.base import View
from altsight.evals.retrieval import retrieval
from altsight.evals.zeroshot import zeroshot
from altsight.hub.clip_benchmark import Benchmarked, load, main
from altsight.hub.load import load_view
from altsight.study.tasks import TaskConfig, open_task
from tests.toy import write_toy_run

pytest.importorskip("clip_benchmark")
pytest.importorskip("webdataset")
TEST = Shapes(60, 1002)
"""Pictures that the toy has not seen."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_run(tmp_path_factory.mktemp("runs") / "toy")


def write(folder: Path, texts: dict[str, list[str]], files: dict[str, str]) -> Path:
    """Write a task in CLIP_benchmark's layout; texts: suffix -> the text of every image."""
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for i in range(len(TEST)):
            parts = {"png": TEST.image(i)} | {suffix: of_images[i].encode() for suffix, of_images in texts.items()}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text("1")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def options(root: Path, run: Path, out: Path, task: str) -> list[str]:
    """Return the arguments of CLIP_benchmark's command line."""
    argv = ["eval", "--model_type", "altsight", "--model", "altsight", "--pretrained", str(run), "--no_amp"]
    argv += ["--dataset", "wds/toy", "--dataset_root", str(root), "--task", task]
    return [*argv, "--num_workers", "0", "--output", str(out)]


def test_zero_shot_classification_is_ours(run: Path, tmp_path: Path) -> None:
    labels = [str(CLASSES.index(TEST.fields(i)["label"])) for i in range(len(TEST))]
    files = {"classnames.txt": "\n".join(CLASSES)}
    files["zeroshot_classification_templates.txt"] = "a picture of a {c}\nthere is a {c} here"
    root = write(tmp_path / "root", {"cls": labels}, files)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "altsight.hub.clip_benchmark"]
    command += options(root, run, out, "zeroshot_classification")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())["metrics"]
    config = TaskConfig(
        "toy",
        test=str(root / "test" / "0.tar"),
        label="cls",
        classes=str(root / "classnames.txt"),
        templates=str(root / "zeroshot_classification_templates.txt"),
    )
    ours = {r.metric: r.value for r in zeroshot(load_view(str(run), device="cpu"), open_task(config))}
    assert found["acc1"] == pytest.approx(ours["top1"], abs=1e-6) and ours["top1"] > 0.3
    assert found["acc5"] == pytest.approx(ours["top5"], abs=1e-6)
    assert found["mean_per_class_recall"] == pytest.approx(ours["mean_class"], abs=1e-6)


def test_retrieval_is_ours(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every caption is another one: what comes first of equals is left open by CLIP_benchmark.
    texts = [f"{TEST.all_captions(i)[0]} {i}" for i in range(len(TEST))]
    root = write(tmp_path / "root", {"txt": texts}, {"dataset_type.txt": "retrieval"})
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", sys.argv)
    main([*options(root, run, out, "zeroshot_retrieval"), "--recall_k", "5", "10"])
    found = json.loads(out.read_text())["metrics"]
    task = open_task(TaskConfig("toy", test=str(root / "test" / "0.tar")))
    ours = {r.metric: r.value for r in retrieval(load_view(str(run), device="cpu"), task)}
    for k in (5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"text_to_image_r{k}"], abs=1e-6)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"image_to_text_r{k}"], abs=1e-6)


def test_the_model_is_what_it_expects(run: Path) -> None:
    model, transform, tokenizer = load(pretrained=str(run))
    image = Image.new("RGB", (50, 40), (200, 30, 30))
    view: View = load_view(str(run), device="cpu")
    assert model.encode_image(transform(image)[None]).allclose(view.encode_image([image]), atol=1e-6)
    vectors = model.encode_text(tokenizer(["a red thing"]))
    assert (vectors / vectors.norm()).allclose(view.encode_text(["a red thing"]), atol=1e-6)
    view.text = None
    with pytest.raises(UserError, match="has no text tower, which CLIP_benchmark's tasks need"):
        Benchmarked(view)
