"""Plans: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from altsight.core.config import merge
from altsight.core.errors import UserError
from altsight.study.plan import Budget, locate, read_plan
from tests.study.made import plan

TEXT = """
name = "toy"
methods = ["mae", "clip"]
references = ["supervised"]
seeds = [3, 4]

[budget]
samples = 640

[source]
path = "shards"
captions = ["{title}"]
label = "class"

[encoder]
model = "vit_tiny_patch16_224"
img_size = 32
patch_size = 8

[train]
batch = 64

[overrides.clip.optim]
lr = 0.25
[overrides.clip.method.text]
layers = 4

[[tasks]]
name = "pets"
train = "shards"
val = "/data/val"
test = "samples:clipart/test"
label = "class"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, old: str, new: str) -> str:
    """Return the sentence with which the plan is refused after `old` became `new`."""
    assert old in TEXT
    with pytest.raises(UserError) as caught:
        read_plan(write(folder, TEXT.replace(old, new, 1)))
    message = str(caught.value)
    assert "\n" not in message
    assert "plan.toml" in message
    return message


def test_reads_everything_and_anchors_relative_paths(tmp_path: Path) -> None:
    read = read_plan(write(tmp_path, TEXT))
    assert read.arms == ("mae", "clip", "supervised")
    assert read.seeds == (3, 4)
    assert read.source is not None and read.source.path == str(tmp_path / "shards")
    task = read.tasks[0]
    assert (task.train, task.val, task.test) == (str(tmp_path / "shards"), "/data/val", "samples:clipart/test")
    assert locate(task.test).endswith("clipart/test")


def test_overrides_are_merged_over_the_methods_own_defaults(tmp_path: Path) -> None:
    read = read_plan(write(tmp_path, TEXT))
    clip, mae = read.run("clip", 3, 640), read.run("mae", 3, 640)
    assert clip.optim.lr == 0.25 and mae.optim.lr != 0.25
    assert clip.method.text.layers == 4
    assert clip.method.text.width == type(clip.method)().text.width
    assert clip.encoder == mae.encoder == read.encoder
    assert (clip.train.samples, clip.train.seed) == (640, 3)


def test_runs_lists_every_arm_under_every_seed(tmp_path: Path) -> None:
    runs = read_plan(write(tmp_path, TEXT)).runs({"mae": 640, "clip": 128, "supervised": 64})
    found = [(arm, run.train.seed, run.train.samples) for arm, run in runs]
    assert found[:3] == [("mae", 3, 640), ("clip", 3, 128), ("supervised", 3, 64)]
    assert [seed for _, seed, _ in found] == [3, 3, 3, 4, 4, 4]


def test_probes_and_log_lines_follow_the_length_of_the_run() -> None:
    run = plan().run("mae", 0, 64 * 800)
    assert run.train.probe_every == 64 * 100
    assert run.train.log_every == 8
    assert plan().run("mae", 0, 64 * 4).train.probe_every == 64


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["mae", "clip"]', '["mea", "clip"]', ["methods", "Did you mean 'mae'"]),
        ('["supervised"]', '["supervized"]', ["references", "Did you mean 'supervised'"]),
        ('["supervised"]', '["mae"]', ["names an arm twice"]),
        ('["mae", "clip"]', "[]", ["methods", "at least one"]),
        ("samples = 640", "", ["budget", "nothing"]),
        ("samples = 640", "samples = 640\nflops = 1e9", ["budget", "samples and flops"]),
        ("samples = 640", 'samples = "many"', ["budget.samples"]),
        ("samples = 640", "sample = 640", ["sample", "budget"]),
        ("seeds = [3, 4]", "seeds = [3, 3]", ["seeds"]),
        ("[overrides.clip.optim]", "[overrides.clap.optim]", ["overrides", "Did you mean 'clip'"]),
        ("[overrides.clip.optim]", "[overrides.mug.optim]", ["overrides.mug", "does not train mug"]),
        ("lr = 0.25", "lrr = 0.25", ["overrides.clip", "lrr"]),
        ("lr = 0.25", 'lr = "high"', ["overrides.clip", "lr"]),
        ("[overrides.clip.optim]\nlr", "[overrides.clip.encoder]\nwidth", ["overrides.clip.encoder", "share one"]),
        ("[overrides.clip.optim]\nlr = 0.25", "[overrides.clip.train]\nseed = 2", ["overrides.clip.train.seed"]),
        ("[encoder]", "[data]\npath = 'x'\n[encoder]", ["data.path", "[source]"]),
        ("samples:clipart/test", "samples:clipart/tset", ["Did you mean 'samples:clipart/test'"]),
        ('name = "toy"', "name = toy", ["no TOML"]),
        ('name = "pets"', 'nam = "pets"', ["tasks", "nam"]),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    message = refused(tmp_path, old, new)
    assert all(word in message for word in words), message


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml' does not exist"):
        read_plan(tmp_path / "nowhere.toml")


def test_two_tasks_of_one_name_are_refused() -> None:
    task = plan().tasks[0]
    with pytest.raises(UserError, match="a name of its own"):
        plan(tasks=(task, task)).check()


def test_budget_kinds() -> None:
    assert [Budget(samples=1).kind, Budget(flops=1.0).kind, Budget(minutes=1.0).kind] == ["samples", "flops", "minutes"]


def test_merge_leaves_other_leaves_alone() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, {"a": {"c": {"d": 5}}, "f": 6}) == {"a": {"b": 1, "c": {"d": 5}}, "e": 3, "f": 6}
    assert base["a"] == {"b": 1, "c": {"d": 2}}


VARIANTS = {"clip_hot": "clip", "clip_cold": "clip"}


def test_a_variant_is_its_method_under_settings_of_its_own() -> None:
    made = plan(
        methods=("mae", "clip_hot", "clip_cold"),
        variants=VARIANTS,
        overrides={"clip_hot": {"method": {"temperature": 1.0}}, "clip_cold": {"optim": {"lr": 0.25}}},
    )
    made.check()
    hot, cold = made.run("clip_hot", 0, 640), made.run("clip_cold", 0, 640)
    assert (hot.name, cold.name, made.method_of("mae")) == ("clip", "clip", "mae")
    assert (hot.method.temperature, cold.method.temperature) == (1.0, 0.07)
    assert (hot.optim.lr, cold.optim.lr) == (5e-4, 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {"clip_hot": "clpi"}}, r"variants\.clip_hot: .* Did you mean 'clip'"),
        ({"variants": {"clip_hot": "clip"}}, r"variants\.clip_hot: the plan does not train clip_hot"),
        ({"methods": ("mae", "mug"), "variants": {"mug": "clip"}}, "'mug' must be a name of its own"),
        ({"methods": ("mae", "a/b"), "variants": {"a/b": "clip"}}, "'a/b' must be a name of its own"),
        ({"methods": ("mae", "untrained"), "variants": {"untrained": "clip"}}, "'untrained' must be a name of its own"),
        ({"methods": ("mae", "clip_hto"), "variants": {"clip_hot": "clip"}}, "Did you mean 'clip_hot'"),
        ({"pairs": ("clpi",)}, r"pairs\.clpi: the plan does not train clpi"),
    ],
)
def test_wrong_variants_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(**changes).check()
