"""The tasks of an evaluation: `[[tasks]]` tables of a TOML file -> data that is open to be evaluated with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from altsight.core.config import from_dict
from altsight.core.errors import UserError, did_you_mean
from altsight.data.files import is_remote
from altsight.data.prepare import read_pairs
from altsight.data.samples import SAMPLES, locate
from altsight.evals.base import Split, Task, no_split
from altsight.evals.changed import Changed, trimmed
from altsight.evals.classes import check_named, class_names, subset, words
from altsight.evals.compositional import read_sugarcrepe, read_winoground
from altsight.evals.corrupted import read_baseline
from altsight.evals.features import label_lists_of, labels_of
from altsight.evals.metrics import METRICS
from altsight.evals.rated import read_ratings
from altsight.evals.templates import check_prompts, templates

SPLITS = ("train", "val", "test")
PATHS = (*SPLITS, "winoground", "sugarcrepe", "images")
"""Fields that hold the path of data."""
FILES = ("templates", "classes", "subset", "baseline")
"""Fields that hold the path of a file, or a name."""


@dataclass(frozen=True)
class TaskConfig:
    """What is evaluated: splits of one data set, in any layout or `samples:NAME/SPLIT`, or contests of captions."""

    name: str
    train: str = ""
    """For probes; zero-shot classification and retrieval need only `test`."""
    val: str = ""
    test: str = ""
    label: str = ""
    """JSON field with the class; "label" where the folders are the classes."""
    captions: tuple[str, ...] = ("{txt}",)
    prompts: tuple[str, ...] = ("{}",)
    """Templates for class names; or give `templates`."""
    templates: str = ""
    """A file of templates, or a named set: see `altsight.evals.templates`."""
    classes: str = ""
    """A file of class names, or "imagenet": see `altsight.evals.classes`. Labels in words where none is given."""
    subset: str = ""
    """The classes that the set has: a file, "imagenet-a" or "imagenet-r". All else is left out, and never answered."""
    multi_label: bool = False
    """The field `label` holds a list."""
    metrics: tuple[str, ...] = ("top1", "top5", "mean_class")
    """Of zero-shot classification; also top1_top5 and roc_auc."""
    caption_prompt: str = "{}"
    """What stands around a caption in retrieval."""
    trim: int = 0
    """Pixels cut off at every side of the test images (ObjectNet's red border: 2)."""
    clean: str = ""
    """Name of the task that this one is compared with."""
    winoground: str = ""
    """A folder with examples.jsonl and images/."""
    sugarcrepe: str = ""
    """A folder with a JSON file for each subset."""
    images: str = ""
    """The folder of the images that SugarCrepe's files name: COCO's val2017."""
    ratings: tuple[str, ...] = ()
    """CSV files as those of Crisscrossed Captions."""
    image_id: str = ""
    """JSON field with the id by which ratings name an image."""
    caption_ids: str = ""
    """JSON field with the list of ids by which they name its captions; their text where it is empty."""
    baseline: str = ""
    """Errors that the mCE is relative to: "alexnet", or the --out file of an evaluation of the baseline."""
    group: str = ""
    """Of a suite, as VTAB's "natural"."""

    def anchored(self, folder: Path) -> TaskConfig:
        """Return the task with its relative paths made absolute against `folder`."""

        def path(word: str) -> str:
            return word if not word or word.startswith(SAMPLES) or is_remote(word) else str(folder / word)

        changes = {name: path(getattr(self, name)) for name in PATHS}
        for name in FILES:
            word = getattr(self, name)
            # Only files: a folder "imagenet" beside the file of tasks is the data, and the word a name.
            changes[name] = str(folder / word) if word and (folder / word).is_file() else word
        return replace(self, ratings=tuple(map(path, self.ratings)), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskFile:
    """A TOML file of tasks."""

    tasks: tuple[TaskConfig, ...] = ()


def read_tasks(path: Path) -> tuple[TaskConfig, ...]:
    """Return the tasks of a TOML file; relative paths are relative to it.

    Raises:
        UserError: the file is missing or wrong, or two tasks go by one name.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the file of tasks '{path}' cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the file of tasks '{path}' is no TOML ({error}): mend that line.") from None
    # A study's plan has tasks, too; what else it holds is read by who carries it out.
    tasks = from_dict({"tasks": table.get("tasks", [])}, TaskFile, str(path)).tasks
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"'{path}' must hold at least one [[tasks]] table, each with a name of its own.")
    return tuple(task.anchored(path.resolve().parent) for task in tasks)


def open_tasks(configs: Sequence[TaskConfig]) -> list[Task]:
    """Return the tasks with their splits read; collective where there are several ranks.

    Raises:
        UserError: a split cannot be read, or a task is not possible as it is described.
    """
    opened = {config.name: open_task(config) for config in configs}
    tasks = []
    for config in configs:
        if config.clean and (config.clean not in opened or config.clean == config.name):
            others = opened.keys() - {config.name}
            raise UserError(
                f"the task '{config.name}' is compared with '{config.clean}', which is no other task here."
                f"{did_you_mean(config.clean, others)}"
            )
        tasks.append(replace(opened[config.name], clean=opened[config.clean] if config.clean else None))
    return tasks


def open_task(config: TaskConfig) -> Task:
    """Return one task with its splits read.

    Raises:
        UserError: as `open_tasks`.
    """
    _check(config)
    splits = {name: _open_split(config, name) for name in SPLITS}
    contests = (read_winoground(config.winoground) if config.winoground else ()) + (
        read_sugarcrepe(config.sugarcrepe, config.images) if config.sugarcrepe else ()
    )
    return Task(
        config.name,
        splits["train"],
        splits["val"],
        splits["test"],
        label=config.label,
        prompts=templates(config.templates) if config.templates else check_prompts(config.prompts),
        classes=_classes(config, splits.values()),
        multi_label=config.multi_label,
        metrics=config.metrics,
        caption_prompt=config.caption_prompt,
        contests=contests,
        ratings=read_ratings(config.ratings),
        image_id=config.image_id,
        caption_ids=config.caption_ids,
        corrupted_errors=read_baseline(config.baseline, config.name) if config.baseline else {},
        group=config.group,
    )


def _open_split(config: TaskConfig, name: str) -> Split:
    source = getattr(config, name)
    if not source:
        return no_split(name)
    pairs = read_pairs(locate(source), config.captions, config.label)
    if name == "test" and config.trim:
        pairs = Changed.of(pairs, trimmed(config.trim))
    return Split(name, pairs)


def _classes(config: TaskConfig, splits: Iterable[Split]) -> dict[str, str]:
    """Return label -> name of the task's classes; {} where they are simply all labels."""
    if not config.classes and not config.subset:
        return {}
    if config.multi_label:
        labels = {label for split in splits for many in label_lists_of(split, config.label) for label in many}
    else:
        labels = {label for split in splits for label in labels_of(split, config.label)}
    names = class_names(config.classes, labels) if config.classes else {n: words(n) for n in sorted(labels - {""})}
    if config.subset:
        return subset(config.subset, names)
    check_named(names, labels, config.classes)
    return names


def _check(config: TaskConfig) -> None:
    """Raise UserError if the fields do not make a task; nothing has been read yet."""
    where = f"the task '{config.name}'"
    if not (config.test or config.winoground or config.sugarcrepe):
        raise UserError(f"{where} names nothing to evaluate: give it `test`, `winoground` or `sugarcrepe`.")
    if (config.classes or config.subset or config.multi_label) and not config.label:
        raise UserError(
            f"{where} has classes but no `label`: name the JSON field (it is 'label' in folders of classes)."
        )
    if config.sugarcrepe and not config.images:
        raise UserError(f"{where} has `sugarcrepe` but no `images`: give the folder of COCO's val2017.")
    if config.ratings and not config.image_id:
        raise UserError(f"{where} has `ratings` but no `image_id`: name the JSON field with the images' ids.")
    if config.trim < 0:
        raise UserError(f"{where} has trim = {config.trim}: it is how many pixels are cut off, so 0 or more.")
    if config.templates and config.prompts != TaskConfig.prompts:
        raise UserError(f"{where} has both `prompts` and `templates`: give one of them.")
    if config.caption_prompt.count("{}") != 1:
        raise UserError(f"{where}: caption_prompt '{config.caption_prompt}' needs one {{}} where the caption goes.")
    for metric in config.metrics:
        if metric not in METRICS:
            raise UserError(f"{where}: there is no metric '{metric}'.{did_you_mean(metric, METRICS)}")
