"""`altsight recipes`: the list, a method's part of it, one in full, and the same for a script."""

from __future__ import annotations

import json

import pytest

from altsight.cli import run
from altsight.recipes.library import STUDIES, recipes


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return what `altsight recipes` prints."""
    assert run(["recipes", *argv]) == 0
    return capsys.readouterr().out


def test_the_list_names_everything_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    first = {line.split()[0] for line in lines if line.strip() and not line.startswith(" ")}
    assert set(recipes()) | set(STUDIES) <= first
    mae = next(line for line in lines if line.startswith("mae_b16_imagenet "))
    assert "2.05 B" in mae and "121 EFLOPs" in mae and " x 16" in mae


def test_a_method_has_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "mae")
    assert "mae_h14_imagenet" in out and "clip_" not in out and "study" not in out


def test_one_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "clip_b16_cc3m")
    for words in (
        "ImageNet zero-shot 17.1, linear probe 53.3",
        "40 passes over the data",
        "img2dataset --url_list cc3m.tsv",
        "altsight prepare raw/cc3m --out data/cc3m --tokenizer openai/clip-vit-base-patch32\n",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        "-m altsight pretrain clip_b16_cc3m --data.path data/cc3m\n",
        "altsight eval runs/clip_b16_cc3m",
        "40% of 989 TFLOPs/s",
    ):
        assert words in out, words
    settings = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("optim.", "data."))}
    assert settings["optim.weight_decay"] == ["0.5", "0.2"] and settings["data.crop.flip"] == ["False", "True"]
    assert "optim.lr" not in settings, "the method's own"
    assert "torchrun --nproc-per-node 8 -m" in said(capsys, "clip_b32_datacomp_small")
    assert "  altsight pretrain visualgpt_b16_coco" in said(capsys, "visualgpt_b16_coco")


def test_a_study_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "study_mmc4")
    for words in ("lcl_generation_regression", "jmhessel/mmc4-ff", "https://image-net.org", "--tokenizer openai/clip"):
        assert words in out, words
    assert "-m altsight study study_mmc4 --out runs/study_mmc4" in out
    samples = said(capsys, "study_sample")
    assert "\n  altsight study study_sample --out runs/study_sample" in samples and "Data" not in samples


def test_json_and_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def hours(*argv: str) -> float:
        (row,) = json.loads(said(capsys, "mae_b16_imagenet", "--json", *argv))
        assert row["samples"] == 1600 * 1_281_167 and row["expected"]["linear probe"] == 68.0
        return float(row["gpu_hours"])

    assert hours("--utilisation", "0.2") == pytest.approx(2 * hours())
    assert hours("--peak", "312e12") == pytest.approx(hours() * 989 / 312)
    assert len(json.loads(said(capsys, "--json"))) == len(recipes()) + len(STUDIES)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "mae_b16_imagent"]) == 2
    assert "Did you mean 'mae_b16_imagenet'?" in capsys.readouterr().err
    assert run(["pretrain", "mug_b16_cc3m"]) == 2
    assert "img2dataset" in capsys.readouterr().err
    assert run(["study", "study_cc"]) == 2
    assert "Did you mean 'study_cc3m'?" in capsys.readouterr().err
