"""What cannot be trained is refused with one sentence before the first step, and nothing is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import altsight_samples
import pytest

from altsight.core.errors import UserError
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared
from altsight.methods import METHODS, find
from altsight.train.loop import pretrain
from altsight.train.run import override
from tests.contract.tiny import tiny_run

READERS = "clip align siglip slip lit flip coca m3ae virtex visualgpt mug lcl composite"
NEED_TEXT = [name for name in METHODS if name in set(READERS.split())]


@pytest.fixture(scope="module")
def images_only(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("images") / "data"
    prepare(PrepareConfig(str(altsight_samples.path("emoji", "val")), out, images_only=True))
    return open_prepared(out)


def one_sentence(error: pytest.ExceptionInfo[UserError], directory: Path) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    assert not (directory / "checkpoints").exists()
    return text


@pytest.mark.parametrize("name", NEED_TEXT)
def test_a_method_that_needs_text_given_images_only(name: str, images_only: Prepared, tmp_path: Path) -> None:
    run = tiny_run(name, images_only.directory, 64)
    with pytest.raises(UserError, match="learns from text, and the data set has none: prepare it with") as error:
        pretrain(run, images_only, tmp_path)
    assert name.split(":")[0] in one_sentence(error, tmp_path) or name == "composite"


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEED_TEXT and name != "supervised"])
def test_the_others_learn_from_images_alone(name: str, images_only: Prepared, tmp_path: Path) -> None:
    run = tiny_run(name, images_only.directory, 16, batch=8)
    assert pretrain(run, images_only, tmp_path).samples_seen == 16


@pytest.mark.parametrize("name", [name for name in METHODS if find(name).least_batch > 1])
def test_a_batch_of_one(name: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = override(tiny_run(name, sample_data.directory, 64), {"train.batch": 1})
    with pytest.raises(UserError, match=f"{name} tells the samples of a batch from each other") as error:
        pretrain(run, sample_data, tmp_path)
    assert "--train.batch 2 or more" in one_sentence(error, tmp_path)


def test_an_encoder_with_batch_norm_under_accumulation(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 64, micro_batch=16)
    encoder = dataclasses.replace(run.encoder, model="resnet18", patch_size=None, width=None, depth=None, heads=None)
    with pytest.raises(UserError, match=r"leave --train\.micro-batch at 0 or") as error:
        pretrain(dataclasses.replace(run, encoder=encoder), sample_data, tmp_path)
    assert "resnet18" in one_sentence(error, tmp_path)


def test_masked_methods_need_patches(sample_data: Prepared, tmp_path: Path) -> None:
    for name in METHODS:
        if find(name).masked is True:
            run = tiny_run(name, sample_data.directory, 64)
            encoder = dataclasses.replace(run.encoder, model="resnet18", patch_size=None, width=None)
            with pytest.raises(UserError, match="use a ViT such as"):
                pretrain(dataclasses.replace(run, encoder=encoder), sample_data, tmp_path / name)
