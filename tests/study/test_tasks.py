"""Files of tasks: what is read, what becomes of it, and what is refused before anything is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from altsight.core.errors import UserError
from altsight.evals.features import classes_of, labels_of
from altsight.study.tasks import TaskConfig, open_task, open_tasks, read_tasks


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder of three folders with two images each."""
    for label, colour in (("n01", (255, 0, 0)), ("n02", (0, 255, 0)), ("n03", (0, 0, 255))):
        (tmp_path / "birds" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (12, 12), colour).save(tmp_path / "birds" / label / f"{i}.png")
    return tmp_path


def config(folder: Path, **fields: object) -> TaskConfig:
    return TaskConfig("birds", test=str(folder / "birds"), label="label", **fields)  # type: ignore[arg-type]


def test_a_test_set_alone_is_a_task(birds: Path) -> None:
    task = open_task(config(birds))
    assert len(task.test) == 6 and len(task.train) == len(task.val) == 0 and not task.trains_probe
    assert classes_of(task) == ("n01", "n02", "n03") and not task.classes


def test_names_subset_and_templates_come_from_files(birds: Path) -> None:
    (birds / "names.json").write_text(json.dumps({"n02": "tawny owl", "n01": "great tit", "n03": "T-shirt"}))
    (birds / "set.txt").write_text("tawny owl\nn01\n")
    (birds / "prompts.txt").write_text("a photo of a {}.\nart of the {c}.\n")
    (birds / "tasks.toml").write_text(
        '[[tasks]]\nname = "birds"\ntest = "birds"\nlabel = "label"\nclasses = "names.json"\nsubset = "set.txt"\n'
        'templates = "prompts.txt"\ntrim = 2\n'
    )
    (found,) = read_tasks(birds / "tasks.toml")
    task = open_task(found)
    assert task.classes == {"n02": "tawny owl", "n01": "great tit"}
    assert task.prompts == ("a photo of a {}.", "art of the {}.")
    assert task.test.source.image(0).startswith(b"P6 8 8 255\n"), "two pixels are cut off at every side"
    assert labels_of(task.test, "label") == ["n01", "n01", "n02", "n02", "n03", "n03"]


def test_the_tasks_of_a_plan_are_read(birds: Path) -> None:
    (birds / "plan.toml").write_text('name = "p"\nmethods = ["clip"]\n[[tasks]]\nname = "birds"\ntest = "birds"\n')
    (found,) = read_tasks(birds / "plan.toml")
    assert found.test == str(birds / "birds")


def test_paths_are_relative_to_the_file_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(
        '[[tasks]]\nname = "a"\ntrain = "samples:emoji/train"\nval = "s3://b/val"\ntest = "/data/x"\n'
        'classes = "imagenet"\ntemplates = "imagenet7"\nratings = ["sits.csv"]\nbaseline = "alexnet"\n'
    )
    (found,) = read_tasks(tmp_path / "tasks.toml")
    assert (found.train, found.val, found.test) == ("samples:emoji/train", "s3://b/val", "/data/x")
    assert (found.classes, found.templates, found.baseline) == ("imagenet", "imagenet7", "alexnet")
    assert found.ratings == (str(tmp_path / "sits.csv"),)


def test_a_task_is_compared_with_its_clean_one(birds: Path) -> None:
    other = TaskConfig("other", test=str(birds / "birds"), label="label", clean="birds")
    tasks = {task.name: task for task in open_tasks([other, config(birds)])}
    assert tasks["other"].clean is not None and tasks["other"].clean.name == "birds" and tasks["birds"].clean is None
    with pytest.raises(UserError, match=r"'other' is compared with 'brids', .* Did you mean 'birds'"):
        open_tasks([TaskConfig("other", test=str(birds / "birds"), clean="brids"), config(birds)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "t"}, "names nothing to evaluate"),
        ({"name": "t", "test": "x", "classes": "y"}, "has classes but no `label`"),
        ({"name": "t", "sugarcrepe": "x"}, "has `sugarcrepe` but no `images`"),
        ({"name": "t", "test": "x", "ratings": ("r.csv",)}, "has `ratings` but no `image_id`"),
        ({"name": "t", "test": "x", "metrics": ("top2",)}, "no metric 'top2'"),
        ({"name": "t", "test": "x", "caption_prompt": "a photo of"}, "needs one {} where the caption goes"),
        ({"name": "t", "test": "x", "trim": -1}, "has trim = -1"),
        ({"name": "t", "test": "x", "prompts": ("a {}",), "templates": "imagenet"}, "both `prompts` and `templates`"),
        ({"name": "t", "test": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"name": "t", "winoground": "/nowhere/at/all"}, "examples.jsonl' cannot be read"),
    ],
)
def test_what_is_no_task_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_task(TaskConfig(**fields))


def test_a_label_without_a_name_is_refused_before_any_evaluation(birds: Path) -> None:
    (birds / "names.json").write_text(json.dumps({"n01": "great tit", "n02": "owl"}))
    with pytest.raises(UserError, match=r"names\.json' has no name for the label 'n03'"):
        open_task(config(birds, classes=str(birds / "names.json")))
    (birds / "names.txt").write_text("tit\nowl\ntit\n")
    with pytest.raises(UserError, match="names two labels 'tit'"):
        open_task(config(birds, classes=str(birds / "names.txt")))


def test_a_folder_of_data_does_not_hide_the_names_of_its_classes_and_templates(birds: Path) -> None:
    (birds / "imagenet").mkdir()
    (birds / "tasks.toml").write_text(
        '[[tasks]]\nname = "a"\ntest = "birds"\nclasses = "imagenet"\ntemplates = "imagenet"\n'
    )
    (found,) = read_tasks(birds / "tasks.toml")
    assert (found.classes, found.templates) == ("imagenet", "imagenet")


def test_a_list_of_labels_is_not_taken_for_one(birds: Path) -> None:
    (birds / "list.jsonl").write_text(json.dumps({"path": "birds/n01/0.png", "kinds": ["owl", "bird"]}))
    task = open_task(TaskConfig("t", test=str(birds / "list.jsonl"), label="kinds"))
    with pytest.raises(UserError, match=r"'kinds' of .*list\.jsonl.* is a list: set multi_label"):
        classes_of(task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        ("tasks = 3", "tasks"),
        ('[[tasks]]\nname = "a"\ntests = "x"', "tests"),
        ('[[tasks]]\nname = "a"\n[[tasks]]\nname = "a"', "a name of its own"),
        ("[[tasks", "is no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises(UserError, match=rf"tasks\.toml.*{message}|{message}.*tasks\.toml"):
        read_tasks(tmp_path / "tasks.toml")
    with pytest.raises(UserError, match=r"no\.toml' cannot be read"):
        read_tasks(tmp_path / "no.toml")
