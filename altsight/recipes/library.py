"""The sources' own settings and the data sets that they name, read from the TOML files beside this one."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altsight.core.config import from_dict
from altsight.core.errors import UserError
from altsight.study.plan import Plan
from altsight.study.wording import flat
from altsight.train.run import Run, default_run, override

HERE = Path(__file__).parent
PAPERS = ("paper_text.toml", "paper_images.toml")
DATA = "data.toml"
CLIP, BERT, GPT2 = "openai/clip-vit-base-patch32", "bert-base-uncased", "openai-community/gpt2"
VOCABULARIES = {CLIP: 49_408, BERT: 30_522, GPT2: 50_257}
"""Known tokenizers that recipes name -> how many ids they have."""


@dataclass(frozen=True)
class DataSet:
    """A data set: what it is, where a user gets it, how it is laid out, and the command that prepares it."""

    name: str
    title: str
    kind: str
    """pairs, images or documents."""
    samples: int
    """Samples that the sources counted; what can be fetched today may be less."""
    get: str
    layout: str = ""
    prepare: str = ""
    classes: int = 0
    released: bool = True

    @property
    def folder(self) -> str:
        """The prepared folder that commands in the documentation and plans name."""
        return f"data/{self.name}"

    def how(self, prepare: str = "") -> str:
        """Return in a few sentences how to come by the prepared folder; `prepare`: the command, if not the usual."""
        if not self.released:
            return self.get
        return f"{self.get} Lay it out as {self.layout}. Then `{prepare or self.prepare}`."


@dataclass(frozen=True)
class Recipe:
    """One method at its source's own setting. The length is one of epochs (over `data`), samples and steps."""

    name: str
    method: str
    data: str
    batch: int
    gpus: int
    """How many GPUs of 80 GB are a sensible number; the estimate of memory is for one of them."""
    source: str
    epochs: float = 0.0
    samples: int = 0
    steps: int = 0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    tokenizer: str = ""
    vocab_size: int = 0
    """Of the tokenizer that `prepare` trains, where the source names no known one."""
    expected: dict[str, float] = field(default_factory=dict)
    """Measure -> what the source found."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the `Run` that differ from the method's defaults, as nested tables."""
    notes: str = ""

    @property
    def data_set(self) -> DataSet:
        """What it is trained on."""
        return data_sets()[self.data]

    @property
    def seen(self) -> int:
        """Samples that the run sees."""
        return round(self.samples or self.steps * self.batch or self.epochs * self.data_set.samples)

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 where no text is read."""
        return self.vocab_size or VOCABULARIES.get(self.tokenizer, 0)

    @property
    def prepare(self) -> str:
        """The command that prepares the data with the tokenizer of the source; empty where there are none to get."""
        base = self.data_set.prepare
        if not base or not self.vocabulary:
            return base
        return f"{base} --tokenizer {self.tokenizer}" if self.tokenizer else f"{base} --vocab-size {self.vocab_size}"

    def run(self) -> Run[Any]:
        """Return the run, with `data.path` left open.

        Raises:
            UserError: there is no such method, or it has no such setting.
        """
        settings = flat(self.settings) | {"train.samples": self.seen, "train.batch": self.batch}
        warmup = self.warmup_steps * self.batch or self.warmup_epochs * self.data_set.samples
        if warmup:
            settings["optim.warmup_fraction"] = warmup / self.seen
        try:
            return override(default_run(self.method), settings)
        except UserError as error:
            raise UserError(f"the recipe {self.name}: {error}") from None

    def missing_data(self) -> str:
        """Return the sentences for a user who gave no data."""
        released = "" if self.data_set.released else "; with other data the number of the source is not to be expected"
        return (
            f"{self.name} learns from {self.data_set.title}, and no data are given. {self.data_set.how(self.prepare)} "
            f"Give the prepared folder: --data.path {self.data_set.folder}{released}."
        )


@dataclass(frozen=True)
class Study:
    """A like-for-like study that comes with the package, as a plan in a TOML file of its name."""

    name: str
    about: str
    gpus: int
    """How many GPUs of 80 GB are a sensible number; 0: none is needed."""
    data: str = ""
    """The data set that it trains on; empty: the embedded sample data."""
    tokenizer: str = ""

    @property
    def path(self) -> Path:
        """Its plan."""
        return HERE / f"{self.name}.toml"

    @property
    def plan(self) -> Plan:
        """Its plan as it is written, unchecked."""
        return from_dict(dict(_read(self.path.name)), Plan, self.path.name)

    @property
    def prepare(self) -> str:
        """The command that prepares its data."""
        return f"{data_sets()[self.data].prepare} --tokenizer {self.tokenizer}" if self.data else ""


STUDIES = {
    study.name: study
    for study in (
        Study("study_sample", "all methods on the embedded sample data, on a CPU", 0),
        Study("study_sample_gpu", "all methods on the embedded sample data, on one GPU", 1),
        Study("study_cc3m", "MUG's benchmark: all methods, one ViT-B/16, CC3M, 400 epochs", 32, "cc3m", BERT),
        Study("study_mmc4", "LCL's table 1: what documents teach under each objective", 32, "mmc4", CLIP),
    )
}


@functools.cache
def data_sets() -> dict[str, DataSet]:
    """Return the data sets by name."""
    return {name: from_dict({"name": name, **table}, DataSet, f"{DATA}: {name}") for name, table in _read(DATA)}


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Return the recipes of the papers by name. Methods are looked up only when a recipe's `run` is asked for."""
    return {
        name: from_dict({"name": name, **table}, Recipe, f"{file}: {name}")
        for file in PAPERS
        for name, table in _read(file)
    }


def _read(file: str) -> list[tuple[str, dict[str, Any]]]:
    with (HERE / file).open("rb") as lines:
        return list(tomllib.load(lines).items())
