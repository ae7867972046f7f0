"""Every ready plan and recipe can be carried out, and wrong names say what is near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import altsight.recipes as recipes
from altsight.core.errors import UserError
from altsight.data.prepared import Prepared
from altsight.methods import METHODS
from altsight.methods.base import Corpus
from altsight.recipes import demo_plan, names, recipe, sample_tasks
from altsight.study.plan import read_plan
from altsight.train.run import build, default_run, override

PLANS = sorted(Path(recipes.__file__).parent.glob("*.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_plans_are_valid_and_every_arm_can_be_built(path: Path, sample_data: Prepared) -> None:
    plan = read_plan(path)
    assert set(plan.arms) == set(METHODS)
    for arm in plan.arms:
        run = plan.run(arm, 0, plan.budget.samples)
        assert run.encoder == plan.encoder and run.data.crop == plan.data.crop
        build(run, Corpus(sample_data.tokenizer, sample_data.classes))


def test_names() -> None:
    assert set(METHODS) <= set(names())
    for name in names():
        assert recipe(name).name == name.removeprefix("sample_")
    with pytest.raises(UserError, match="Did you mean 'sample_clip'"):
        recipe("sample_clpi")


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
