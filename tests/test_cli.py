"""The command line as a user meets it: a mistake is one plain sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import altsight_samples
import pytest
from PIL import Image

from altsight.cli import COMMANDS, run
from altsight.data.prepared import Prepared
from altsight.train.run import save_run
from tests.contract.tiny import tiny_run

TRAIN = str(altsight_samples.path("clipart", "val"))


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    """Run a command that must exit with 2 and one line on standard error that holds all `words`."""
    assert run(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("altsight:")]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        argv = [name, *{"pretrain": ["clip"], "transfer": ["finetune"]}.get(name, []), "--help"]
        with pytest.raises(SystemExit) as done:
            run(argv)
        assert done.value.code == 0
        assert "--" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["pretrian"], "pretrian", "Did you mean 'pretrain'?")


def test_unknown_method_or_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["pretrain", "clpi"], "clpi", "Did you mean 'clip'?")
    fails(capsys, ["pretrain", "sample_mgu"], "Did you mean 'sample_mug'?")


def test_missing_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing, out = str(tmp_path / "no"), str(tmp_path / "out")
    fails(capsys, ["prepare", missing, "--out", out], "does not exist", missing)
    fails(capsys, ["check", missing], missing)
    fails(capsys, ["pretrain", "mae", "--data.path", missing, "--out", out], missing)
    fails(capsys, ["pretrain", "mae"], "--data.path")
    fails(capsys, ["eval", missing], "run.json")
    fails(capsys, ["study", str(tmp_path / "no.toml")], "no.toml")
    assert not list(tmp_path.iterdir())


def test_empty_shard_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(capsys, ["prepare", str(tmp_path / "empty"), "--out", str(tmp_path / "out")], "empty", ".tar")
    assert not (tmp_path / "out").exists()


def test_truncated_tar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = next(Path(TRAIN).glob("*.tar")).read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    fails(capsys, ["prepare", str(tmp_path), "--out", str(tmp_path / "out")], "00000.tar", "truncated")
    assert not (tmp_path / "out").exists()


def test_no_captions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with tarfile.open(next(Path(TRAIN).glob("*.tar"))) as old, tarfile.open(tmp_path / "00000.tar", "w") as new:
        for member in list(old)[:30]:
            if member.name.endswith("webp"):
                new.addfile(member, old.extractfile(member))
    fails(capsys, ["prepare", str(tmp_path), "--out", str(tmp_path / "out")], "caption", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_image_size_and_patch(capsys: pytest.CaptureFixture[str], sample_path: Path, tmp_path: Path) -> None:
    argv = ["pretrain", "mae", "--data.path", str(sample_path), "--out", str(tmp_path / "r")]
    fails(capsys, [*argv, "--encoder.img-size", "100"], "100", "16", "--encoder.img-size 96 or 112")
    assert not (tmp_path / "r").exists()


def test_batch_larger_than_the_data(capsys: pytest.CaptureFixture[str], sample_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    argv = ["pretrain", "mae", "--data.path", str(sample_path), "--out", str(out), "--train.batch", "999999"]
    fails(capsys, [*argv, "--train.samples", "9999999"], "999,999", "larger than the data set")
    assert not out.exists()


def test_unknown_setting_in_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('name = "x"\nmethods = ["mea"]\ntasks = []\n[budget]\nsamples = 1\n')
    fails(capsys, ["study", str(plan), "--out", str(tmp_path / "out")], str(plan), "Did you mean 'mae'?")
    assert not (tmp_path / "out").exists()


def test_corrupt_checkpoints(capsys: pytest.CaptureFixture[str], sample_data: Prepared, tmp_path: Path) -> None:
    from altsight.train.loop import pretrain

    pretrain(tiny_run("mae", sample_data.directory, 64, batch=32), sample_data, tmp_path / "r")
    for path in (tmp_path / "r/checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    fails(capsys, ["eval", str(tmp_path / "r")], "damaged")


def test_not_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_run(tiny_run("mae", tmp_path, 64), tmp_path / "run.json")
    (tmp_path / "classes.json").write_text("[]")
    fails(capsys, ["eval", str(tmp_path)], "no checkpoint")


def test_the_whole_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """prepare, check, pretrain with broken images in a shard, eval: as the README has it, in real processes."""
    shards = tmp_path / "shards"
    shutil.copytree(TRAIN, shards)
    break_images(next(shards.glob("*.tar")), every=50)
    data, out = tmp_path / "data", tmp_path / "run"

    def altsight(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "altsight", *argv], capture_output=True, text=True, timeout=300)

    done = altsight("prepare", str(shards), "--out", str(data), "--captions", "{title}", "--label", "label")
    assert done.returncode == 0, done.stderr
    checked = altsight("check", str(data), "--batch", "32", "--samples", "640", "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert json.dumps(report).count("broken") and '"steps": 20' in json.dumps(report)
    small = ["--encoder.img-size", "32", "--encoder.patch-size", "8", "--encoder.model", "vit_tiny_patch16_224"]
    small += ["--encoder.depth", "1", "--train.batch", "32", "--train.samples", "320", "--method.decoder.depth", "1"]
    trained = altsight("pretrain", "mae", "--data.path", str(data), "--out", str(out), *small)
    assert trained.returncode == 0, trained.stderr
    assert (out / "bad_samples.txt").read_text().count("broken image") > 0
    results = tmp_path / "results.json"
    evaluated = altsight("eval", str(out), "--evaluators", "knn", "--out", str(results))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "knn" in evaluated.stdout and json.loads(results.read_text())
    stopped = altsight("pretrain", "mae", "--data.path", str(data), "--out", str(tmp_path / "strict"), *small,
                       "--data.max-bad-fraction", "0.001")  # fmt: skip
    assert stopped.returncode == 2 and "--data.max-bad-fraction" in stopped.stderr


def test_check_writes_a_contact_sheet(
    capsys: pytest.CaptureFixture[str], sample_path: Path, sample_data: Prepared, tmp_path: Path
) -> None:
    page, picture = tmp_path / "sheet.html", tmp_path / "sheet.png"
    argv = ["check", str(sample_path), "--most", "128", "--workers", "0"]
    assert run([*argv, "--sheet", str(page), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["samples"], report["looked_at"]) == (len(sample_data.source), 128)
    assert str(page) in printed.err.replace("\n", "")
    assert page.read_text(encoding="utf-8").count("<figure") == 60
    assert run([*argv, "--sheet", str(picture), "--sheet-samples", "7"]) == 0
    printed = capsys.readouterr()
    assert f"{len(sample_data.source):,} samples in " in printed.out and "128" in printed.out
    assert Image.open(picture).format == "PNG"


def test_check_of_what_cannot_be_trained_on(
    capsys: pytest.CaptureFixture[str], sample_path: Path, tmp_path: Path
) -> None:
    argv = ["check", str(sample_path), "--workers", "0"]
    fails(capsys, [*argv, "--batch", "999999", "--samples", "9999999"], "999,999", "larger than the data set")
    fails(capsys, [*argv, "--batch", "64", "--samples", "63"], "shorter than one batch")
    fails(capsys, [*argv, "--sheet", str(tmp_path / "sheet.gif")], "sheet.gif", ".html or .png")
    fails(capsys, [*argv, "--sheet", str(tmp_path / "no/sheet.png")], "no/sheet.png", "cannot be written")
    fails(capsys, [*argv, "--sheet", str(tmp_path / "sheet.png"), "--sheet-samples", "0"], "0 samples")
    assert not list(tmp_path.iterdir())
    shards = tmp_path / "shards"
    shutil.copytree(TRAIN, shards)
    break_images(next(shards.glob("*.tar")), every=1)
    assert run(["prepare", str(shards), "--out", str(tmp_path / "data"), "--captions", "{title}"]) == 0
    sheet = tmp_path / "sheet.html"
    fails(capsys, ["check", str(tmp_path / "data"), "--sheet", str(sheet)], "none of the 609 samples", "begins with")
    assert "begins with" in sheet.read_text(encoding="utf-8"), "the sheet is there to show what is wrong"


def break_images(shard: Path, every: int) -> None:
    """Overwrite the start of every n-th image in a tar with zeros."""
    with tarfile.open(shard) as tar:
        images = [m for m in tar if m.name.endswith("webp")]
    with shard.open("r+b") as file:
        for member in images[::every]:
            file.seek(member.offset_data)
            file.write(b"\0" * 64)


def test_codebook_is_made_and_trained_with(
    capsys: pytest.CaptureFixture[str], sample_data: Prepared, tmp_path: Path
) -> None:
    data, words = str(sample_data.directory), tmp_path / "words.safetensors"
    size = ["--vocabulary", "64", "--patch-size", "8", "--img-size", "32", "--samples", "128"]
    assert run(["codebook", data, "--out", str(words), *size]) == 0
    assert "64 words; the commonest is" in capsys.readouterr().err
    tiny = ["--encoder.width", "48", "--encoder.depth", "1", "--encoder.heads", "3", "--encoder.img-size", "32"]
    tiny += ["--encoder.patch-size", "8", "--train.samples", "64", "--train.batch", "32", "--train.precision", "fp32"]
    method = ["--method.tokenizer.vocabulary", "64", "--method.tokenizer.path", str(words)]
    assert run(["pretrain", "beit", "--data.path", data, "--out", str(tmp_path / "run"), *tiny, *method]) == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_codebook_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], sample_data: Prepared, tmp_path: Path
) -> None:
    data = str(sample_data.directory)
    fails(capsys, ["codebook", str(tmp_path / "no"), "--out", str(tmp_path / "w.safetensors")], "does not exist")
    fails(capsys, ["codebook", data, "--out", str(tmp_path / "w.pt")], "w.pt", "--out")
    fails(capsys, ["codebook", data, "--out", str(tmp_path / "w.safetensors"), "--patch-size", "300"], "--patch-size")
    assert not list(tmp_path.iterdir())
