"""`altsight prepare`: a folder of shards -> index, tokenizer and statistics, which every run on the data starts from.

The shards stay where they are. The folder that is written appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from altsight.core.config import read_json, write_json
from altsight.core.errors import UserError
from altsight.data.index import SAMPLE, Index, find_shards, index_shards
from altsight.data.sources import Captions, Pairs
from altsight.data.survey import Progress, Survey, percentiles, silent, token_counts
from altsight.data.text import Tokenizer, load_tokenizer, train_tokenizer

VERSION = 1
INDEX, TOKENIZER, DATASET = "index.npy", "tokenizer.json", "dataset.json"


@dataclass(frozen=True)
class PrepareConfig:
    """What `altsight prepare` reads and writes."""

    source: Positional[str]
    """A tar shard, a folder of them, or a quoted glob pattern."""
    out: Path
    """The folder to write; one that was prepared before is replaced."""
    captions: tuple[str, ...] = ("{txt}",)
    """Templates over `txt` and the fields of the JSON part, for example "{title}, {tags}"."""
    label: str = ""
    """JSON field with the class of a sample."""
    tokenizer: str = ""
    """A tokenizer.json file or a Hugging Face name; empty: one is trained on the captions."""
    vocab_size: int = 8192
    """Size of the trained tokenizer."""
    images_only: bool = False
    """Leave the text aside; otherwise data without a caption are an error."""


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be trained on or evaluated with; `statistics` is empty where nothing was written."""

    directory: Path
    source: Pairs
    tokenizer: Tokenizer | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted; a sample's label is its place among them."""
        return self.source.classes

    def hash(self) -> str:
        """Return 12 hex digits that name the samples, in order, and how their captions are made."""
        digest = hashlib.sha256(np.ascontiguousarray(self.source.index.samples).view(np.uint8).data)
        digest.update(repr([shard.name for shard in self.source.index.shards]).encode())
        digest.update(repr(self.source.captions.templates).encode())
        return digest.hexdigest()[:12]


def prepare(config: PrepareConfig, progress: Progress = silent) -> Prepared:
    """Index the shards, train or load the tokenizer, and write both with the statistics to `config.out`.

    Raises:
        UserError: the source, the captions, the label or the tokenizer cannot be used, or `out` cannot be written or
            holds something else. Nothing is left behind then, nor when `progress` raises.
    """
    _check_out(config.out)
    captions = Captions(() if config.images_only else config.captions)
    known = load_tokenizer(config.tokenizer) if config.tokenizer and not config.images_only else None
    with _appears_whole(config.out) as folder:
        source = _index(config.source, captions, config.label, progress)
        survey = Survey(source, config.source, needs_text=not config.images_only)
        if known or config.images_only:
            tokenizer = known
            survey.run(progress)
        else:
            tokenizer = train_tokenizer(survey.captions(progress), config.vocab_size)
        statistics = survey.statistics()
        if tokenizer:
            statistics["caption_tokens"] = percentiles(token_counts(source, tokenizer, progress))
        with _writing(config.out):
            _write(folder, replace(source, classes=survey.classes), tokenizer, statistics)
    return open_prepared(config.out)


def read_source(source: str, captions: Sequence[str] = ("{txt}",), label: str = "") -> Prepared:
    """Index the shards that `source` names in memory and write nothing, for data that is only evaluated with.

    Raises:
        UserError: the source, the captions or the label cannot be used.
    """
    pairs = _index(source, Captions(tuple(captions)), label, silent)
    survey = Survey(pairs, source, needs_text=False)
    if label:
        survey.run(silent)
    return Prepared(Path(source), replace(pairs, classes=survey.classes))


def open_prepared(directory: str | os.PathLike[str]) -> Prepared:
    """Open what `prepare` wrote; the index is memory-mapped.

    Raises:
        UserError: the folder was not prepared, by another version, or its shards have moved or changed.
    """
    directory = Path(directory)
    if not (directory / DATASET).is_file():
        state = "is no prepared data set" if directory.exists() else "does not exist"
        raise UserError(f"'{directory}' {state}: run `altsight prepare SOURCE --out {directory}` first.")
    data = read_json(directory / DATASET)
    again = f"run `altsight prepare` again for '{directory}'"
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise UserError(f"'{directory / DATASET}' was written by another version of altsight: {again}.")
    for shard in data["shards"]:
        _check_shard(Path(shard["path"]), shard["bytes"], again)
    try:
        samples = np.load(directory / INDEX, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the index '{directory / INDEX}' cannot be read ({error}): {again}.") from None
    if samples.dtype != SAMPLE or len(samples) != data["statistics"]["samples"]:
        raise UserError(f"the index '{directory / INDEX}' does not belong to '{DATASET}' beside it: {again}.")
    index = Index(tuple(Path(shard["path"]) for shard in data["shards"]), samples)
    source = Pairs(index, Captions(tuple(data["captions"])), data["label"], tuple(data["classes"]))
    tokenizer = load_tokenizer(str(directory / TOKENIZER)) if data["tokenizer"] else None
    return Prepared(directory, source, tokenizer, data["statistics"])


def _index(source: str, captions: Captions, label: str, progress: Progress) -> Pairs:
    shards = find_shards(source)
    done = itertools.count(1)
    index = index_shards(shards, lambda shard: progress("indexing shards", next(done), len(shards)))
    if not len(index):
        raise UserError(
            f"the shards of '{source}' hold no image: altsight reads tar members named KEY.jpg, KEY.png or KEY.webp."
        )
    return Pairs(index, captions, label)


def _write(folder: Path, source: Pairs, tokenizer: Tokenizer | None, statistics: dict[str, Any]) -> None:
    index = source.index
    counts = np.bincount(index.samples["shard"], minlength=len(index.shards))
    np.save(folder / INDEX, index.samples)
    if tokenizer:
        tokenizer.save(folder / TOKENIZER)
    data = {
        "version": VERSION,
        "shards": [
            {"path": str(shard), "bytes": shard.stat().st_size, "samples": int(count)}
            for shard, count in zip(index.shards, counts, strict=True)
        ],
        "captions": source.captions.templates,
        "label": source.label,
        "classes": source.classes,
        "tokenizer": tokenizer is not None,
        "statistics": statistics,
    }
    write_json(folder / DATASET, data)


def _check_shard(shard: Path, size: int, again: str) -> None:
    try:
        now = shard.stat().st_size
    except OSError:
        raise UserError(f"the shard '{shard}' is gone: put it back, or {again}.") from None
    if now != size:
        raise UserError(f"the shard '{shard}' has changed from {size:,} to {now:,} bytes: {again}.")


def _check_out(out: Path) -> None:
    """Refuse to replace anything but an empty folder or one that holds a prepared data set and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file: give --out a folder that does not exist yet.")
    held = set(os.listdir(out))
    if held and (DATASET not in held or held - {INDEX, TOKENIZER, DATASET}):
        raise UserError(
            f"the folder '{out}' holds other files than a prepared data set: give --out a folder that does not exist "
            "yet."
        )


@contextmanager
def _appears_whole(out: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when the body is done, and vanishes when it raises."""
    target = out.resolve()
    # Parents that do not exist are made last, so that a failure leaves none of them behind.
    home = next(parent for parent in target.parents if parent.exists())
    new, old = home / f".{target.name}.new-{os.getpid()}", home / f".{target.name}.old-{os.getpid()}"
    try:
        with _writing(out):
            new.mkdir()
        yield new
        with _writing(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(old)
            new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}): give --out another folder.") from None
