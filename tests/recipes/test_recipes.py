"""Every ready plan and recipe can be carried out, and wrong names say what is near."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import altsight.recipes as ready
from altsight.core.errors import UserError
from altsight.data.prepare import PrepareConfig
from altsight.data.prepared import Prepared
from altsight.data.views import NORMALIZATIONS
from altsight.methods import METHODS, find
from altsight.methods.base import Corpus
from altsight.nn.encoder import Encoder
from altsight.recipes import demo_plan, missing_data, names, recipe, sample_tasks, study_plan
from altsight.recipes.cost import _tokenizer, from_scratch
from altsight.recipes.library import STUDIES, VOCABULARIES, Recipe, data_sets, recipes
from altsight.study.plan import read_plan
from altsight.train.run import Run, default_run, override

DEMOS = sorted(Path(ready.__file__).parent.glob("demo_*.toml"))
ALONE = {"lit"}
"""Methods that need an encoder that is trained already, and are in no study of training one."""


def construct(run: Run[Any], corpus: Corpus) -> None:
    """Build the method of `run` at its full size, without memory for its weights."""
    run = from_scratch(run)
    with torch.device("meta"):
        find(run.name)(run.method, Encoder(run.encoder), corpus)  # type: ignore[call-arg]


@pytest.mark.parametrize("path", DEMOS, ids=lambda p: p.stem)
def test_demo_plans_are_valid_and_every_arm_can_be_built(path: Path, sample_data: Prepared) -> None:
    plan = read_plan(path)
    for arm in plan.arms:
        run = plan.run(arm, 0, plan.budget.samples)
        assert run.encoder == plan.encoder and run.data.crop == plan.data.crop
        construct(run, Corpus.of(sample_data))


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_valid_and_every_arm_can_be_built(name: str, sample_data: Prepared) -> None:
    plan = read_plan(STUDIES[name].path)
    for arm in plan.arms:
        construct(plan.run(arm, 0, plan.train.batch), Corpus.of(sample_data))


@pytest.mark.parametrize("name", ["study_sample", "study_sample_gpu", "study_cc3m"])
def test_a_study_of_all_methods_has_all(name: str) -> None:
    plan = STUDIES[name].plan
    labelled = {"supervised"} if name == "study_cc3m" else set()
    assert set(METHODS) - set(map(plan.method_of, plan.arms)) <= ALONE | labelled


def test_the_study_of_documents_is_the_table_of_its_paper() -> None:
    plan = STUDIES["study_mmc4"].plan
    assert plan.method_of("lcl_generation") == plan.method_of("lcl_generation_regression") == "lcl"
    assert plan.pairs == ("clip", "coca", "m3ae") and plan.budget.kind == "flops"
    runs = {arm: plan.run(arm, 0, 4096) for arm in plan.arms}
    objectives = {arm: run.method.objective for arm, run in runs.items() if run.name == "lcl"}
    assert objectives == {
        "lcl": "lcl",
        "lcl_generation": "generation",
        "lcl_generation_regression": "generation_regression",
    }


@pytest.mark.parametrize("found", recipes().values(), ids=lambda r: r.name)
def test_recipes_resolve_and_can_be_built(found: Recipe) -> None:
    run = recipe(found.name)
    assert (run.name, run.train.samples, run.train.batch) == (found.method, found.seen, found.batch)
    assert run.steps > 0 and not run.data.path
    construct(run, Corpus(_tokenizer(300), ("a", "b"), "documents" if found.data_set.kind == "documents" else "pairs"))


@pytest.mark.parametrize("found", recipes().values(), ids=lambda r: r.name)
def test_recipes_say_what_they_must(found: Recipe) -> None:
    assert found.source and (found.expected or found.notes)
    assert sum(map(bool, (found.epochs, found.samples, found.steps))) == 1
    assert not (found.warmup_epochs and found.warmup_steps)
    assert found.batch % found.gpus == 0 and (found.gpus <= 8 or found.gpus % 8 == 0)
    assert found.tokenizer in {"", *VOCABULARIES} and not (found.tokenizer and found.vocab_size)
    size = {"vit_small": "_s", "vit_large": "_l", "vit_huge": "_h", "vit_giant": "_g", "resnet50": "_r50"}
    model = found.settings.get("encoder", {}).get("model", "vit_base")
    if model.startswith(("vit", "resnet")):
        assert next((short for long, short in size.items() if model.startswith(long)), "_b") in found.name


def test_every_method_has_a_recipe() -> None:
    assert set(METHODS) <= {found.method for found in recipes().values()}


@pytest.mark.parametrize("data", data_sets().values(), ids=lambda d: d.name)
def test_data_sets_say_where_they_are_and_how_they_are_prepared(data: Any) -> None:
    assert data.kind in ("pairs", "images", "documents") and data.samples > 0
    assert "http" in data.get or not data.released
    assert data.released == bool(data.layout) == bool(data.prepare)
    if data.released:
        program, command, *argv = shlex.split(data.prepare)
        config = tyro.cli(PrepareConfig, args=argv)
        assert (program, command) == ("altsight", "prepare")
        assert config.source.startswith(f"raw/{data.name}") and str(config.out) == data.folder
        assert config.source.removesuffix("*.jsonl").removesuffix("*.parquet").rstrip("/") in data.layout


def test_values_of_the_specification() -> None:
    mae = recipe("mae_b16_imagenet")
    assert mae.train.samples == 1600 * 1_281_167
    assert mae.optim.peak_lr(mae.train.batch) == pytest.approx(2.4e-3)
    assert mae.optim.warmup_fraction == pytest.approx(40 / 1600)
    clip = recipe("clip_l14_wit400m")
    assert (clip.optim.peak_lr(clip.train.batch), clip.method.embed_dim, clip.method.text.width) == (4e-4, 768, 768)
    assert clip.optim.warmup_fraction == pytest.approx(2000 * 32_768 / (32 * 400e6))
    slip = recipe("clip_b16_cc3m")
    assert (slip.optim.weight_decay, slip.optim.min_lr, slip.train.batch) == (0.5, 1e-5, 4096)
    assert slip.optim.warmup_fraction == pytest.approx(1 / 40)
    assert recipes()["clip_b32_laion400m"].expected == {"ImageNet zero-shot": 62.96}
    m3ae = recipe("m3ae_b16_cc12m").encoder
    assert NORMALIZATIONS[m3ae.normalization] == ((0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307))
    assert recipe("visualgpt_b16_coco").method.language_model, "it starts from a language model"
    assert recipe("lit_b32_cc12m").train.samples == 12_000 * 16_384
    simclr = recipe("simclr_b16_yfcc15m").method
    assert (simclr.hidden, simclr.out_dim, simclr.last_norm, simclr.views.colour.brightness) == (4096, 256, False, 0.4)
    assert recipe("supervised_b16_imagenet").optim.ema == 0.9999


def test_efficienttrain_plus_plus_of_200_epochs_costs_200_epochs() -> None:
    """Specification 3.3: a stage of size B takes (E / 10) (224 / B)^2 real epochs."""
    run = recipe("supervised_s16_imagenet_etpp")
    epochs = sum(20 * (224 / size) ** 2 for size in [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2)
    assert run.train.samples == pytest.approx(epochs * 1_281_167, rel=0.002)


def test_names() -> None:
    assert set(METHODS) | set(recipes()) | {"sample_clip"} <= set(names())
    assert recipe("sample_clip").name == recipe("clip").name == recipe("clip_b16_cc3m").name == "clip"
    for wrong, near in (("sample_clpi", "sample_clip"), ("clip_b61_cc3m", "clip_b16_cc3m")):
        with pytest.raises(UserError, match=f"Did you mean '{near}'"):
            recipe(wrong)


def test_a_broken_recipe_is_named() -> None:
    broken = dataclasses.replace(recipes()["mae_b16_imagenet"], settings={"optim": {"lrr": 1.0}})
    with pytest.raises(UserError, match=r"the recipe mae_b16_imagenet: mae has no setting 'optim\.lrr'"):
        broken.run()


def test_missing_data_says_where_they_are() -> None:
    said = missing_data("mug_b16_cc3m")
    for words in ("https://ai.google.com", "img2dataset --url_list", "raw/cc3m/00000.tar", "--data.path data/cc3m"):
        assert words in said
    assert "altsight prepare raw/cc3m --out data/cc3m --tokenizer bert-base-uncased" in said
    assert "--vocab-size 100000" in missing_data("align_b3_cc3m")
    assert "never released" in missing_data("clip_b32_wit400m") and "img2dataset" not in missing_data(
        "clip_b32_wit400m"
    )
    assert missing_data("mae").startswith("no data to train on")


def test_a_packaged_study_looks_for_its_data_where_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"study_cc3m learns from .*data/cc3m' does not exist.*img2dataset.*bert-base"):
        study_plan("study_cc3m")
    with pytest.raises(
        UserError, match=r"evaluates on ImageNet-1k, and '.*raw/imagenet/train' does not exist.*Register"
    ):
        study_plan("study_cc3m", sample_path)
    for split in ("train", "held_out", "val"):
        (tmp_path / "raw/imagenet" / split).mkdir(parents=True)
    plan = study_plan("study_cc3m", sample_path)
    assert plan.data.path == str(sample_path) and plan.tasks[0].train == str(tmp_path / "raw/imagenet/train")
    (tmp_path / "data/cc3m").mkdir(parents=True)
    assert study_plan("study_cc3m").data.path == str(tmp_path / "data/cc3m")
    assert study_plan("study_sample").source is not None


def test_another_plan_may_be_given_other_data(tmp_path: Path) -> None:
    plan = study_plan(str(DEMOS[0]), tmp_path)
    assert plan.source is None and plan.data.path == str(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'study_mmc4'"):
        study_plan("study_mmc")


def test_sample_tasks() -> None:
    assert [task.name for task in sample_tasks()] == [task.name for task in demo_plan().tasks]


def test_override_replaces_dotted_settings() -> None:
    run = override(default_run("mug"), {"train.samples": 10, "method.captions.length": 12, "optim.betas": (0.5, 0.6)})
    assert (run.train.samples, run.method.captions.length, run.optim.betas) == (10, 12, (0.5, 0.6))
    assert default_run("mug").train.samples != 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.sample": 1}, "Did you mean 'train.samples'"),
        ({"train": 1}, "expected"),
        ({"method.mask_ratio.x": 1}, "no setting"),
        ({"train.samples": "many"}, "train.samples"),
    ],
)
def test_override_refuses_what_is_wrong(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        override(default_run("mae"), settings)


def test_a_processor_without_bf16_gets_a_smaller_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    fast = demo_plan()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    slow = demo_plan()
    assert slow.budget.samples == fast.budget.samples // 3
    assert slow.run("clip", 0, slow.budget.samples).steps > 100
