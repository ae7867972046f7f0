"""The folder that `altsight prepare` and `altsight mix` write, and what is opened from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from altsight.core.config import from_dict, read_json, write_json
from altsight.core.errors import UserError
from altsight.data import files, totals
from altsight.data.captions import Captions
from altsight.data.documents import Sampling
from altsight.data.images import Folder, Images, open_stored
from altsight.data.index import Shard, open_index
from altsight.data.layout import LISTING
from altsight.data.mixture import Mixture
from altsight.data.scan import Scanned
from altsight.data.sources import Interleaves, Pairs, Source
from altsight.data.text import Tokenizer, load_tokenizer

VERSION = 2
INDEX, SHARDS, TOKENIZER, DATASET, STORE, NAMES = (
    *("index.npy", "shards.jsonl", "tokenizer.json", "dataset.json"),
    *("images", "names.npy"),
)
WRITTEN = (INDEX, SHARDS, TOKENIZER, DATASET, STORE, LISTING)


@dataclass(frozen=True)
class Contents:
    """dataset.json: what the folder holds besides the index. kind: pairs, documents, or a mixture of other folders."""

    kind: str
    digest: str
    statistics: dict[str, Any]
    version: int = VERSION
    tokenizer: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """What `prepare` was asked for: the same question of more shards reads only the new ones."""
    captions: tuple[str, ...] = ()
    label: str = ""
    classes: tuple[str, ...] = ()
    root: str = ""
    """Folder of images that the shards only name; empty where they lie in shards of their own."""
    sampling: Sampling = field(default_factory=Sampling)
    as_pairs: bool = False
    mixture: dict[str, float] = field(default_factory=dict)
    """Prepared folder -> weight."""


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be trained on or evaluated with; `statistics` is empty where nothing was written."""

    directory: Path
    source: Source
    tokenizer: Tokenizer | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted; a sample's label is its place among them."""
        return self.source.classes

    def hash(self) -> str:
        """Return 12 hex digits that name the samples, their content and order, and how their captions are made."""
        return self.digest


def open_prepared(directory: str | os.PathLike[str]) -> Prepared:
    """Open what `prepare` or `mix` wrote; the index is memory-mapped.

    Raises:
        UserError: the folder was not prepared, by another version, or its shards have moved or changed. (Remote
            shards are looked at when they are read.)
    """
    directory = Path(directory)
    again = f"run `altsight prepare` again for '{directory}'"
    contents = read_contents(directory)
    tokenizer = load_tokenizer(str(directory / TOKENIZER)) if contents.tokenizer else None
    source: Source = _mixture(contents, directory) if contents.kind == "mixture" else _one(contents, directory, again)
    return Prepared(directory, source, tokenizer, contents.statistics, contents.digest)


def read_contents(directory: Path) -> Contents:
    """Read dataset.json; UserError if the folder was not prepared, or by another version."""
    if not (directory / DATASET).is_file():
        state = "is no prepared data set" if directory.exists() else "does not exist"
        raise UserError(f"'{directory}' {state}: run `altsight prepare SOURCE --out {directory}` first.")
    data = read_json(directory / DATASET)
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise UserError(
            f"'{directory / DATASET}' was written by another version of altsight: run `altsight prepare` again for "
            f"'{directory}'."
        )
    return from_dict(data, Contents, str(directory / DATASET))


def read_shards(folder: Path) -> list[Scanned]:
    """Return the shards of a prepared folder with what was found in each."""
    path = folder / SHARDS
    try:
        with path.open(encoding="utf-8") as lines:
            return [_scanned(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): run `altsight prepare` again for '{folder}'.") from None


def _scanned(data: dict[str, Any]) -> Scanned:
    """Build by hand what cattrs would take seconds for, where there are tens of thousands of shards."""
    about = data.pop("shard")
    shard = Shard(**about | {"header": tuple(about["header"])})
    return Scanned(shard, **data | {name: tuple(data[name]) for name in ("classes", "fields")})


def write_shards(folder: Path, scanned: Iterable[Scanned]) -> None:
    """Write what `read_shards` reads."""
    with (folder / SHARDS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(found), ensure_ascii=False) + "\n" for found in scanned)


def write_contents(folder: Path, contents: Contents) -> None:
    """Write dataset.json, last of all: a folder without it is not taken for a prepared one."""
    write_json(folder / DATASET, asdict(contents))


def _one(contents: Contents, directory: Path, again: str) -> Source:
    shards = [_located(found.shard, directory) for found in read_shards(directory)]
    for shard in shards:
        _check_shard(shard, again)
    index = open_index(shards, directory / INDEX, again)
    images = _images(contents, directory, again)
    if contents.kind == "documents":
        return Interleaves(index, images, contents.sampling, contents.as_pairs)
    return Pairs(index, Captions(contents.captions), contents.label, contents.classes, images)


def _images(contents: Contents, directory: Path, again: str) -> Images | None:
    if contents.root:
        return Folder(contents.root)
    store = directory / STORE
    if not store.is_dir():
        return None
    shards = [found.shard for found in read_shards(store)]
    for shard in shards:
        _check_shard(shard, again)
    return open_stored(open_index(shards, store / INDEX, again), store / NAMES)


def _mixture(contents: Contents, directory: Path) -> Mixture:
    home = directory.resolve()
    parts = [open_prepared(os.path.normpath(home / folder)) for folder in contents.mixture]
    digest = mixture_digest(parts, list(contents.mixture.values()))
    if digest != contents.digest:
        raise UserError(f"the data that '{directory}' mixes have been prepared anew: run `altsight mix` again.")
    return Mixture(tuple(part.source for part in parts), tuple(contents.mixture.values()), contents.classes)


def mixture_digest(parts: Sequence[Prepared], weights: Sequence[float]) -> str:
    """Return 12 hex digits that name a mixture."""
    return totals.digest([], *(part.hash() for part in parts), *weights)


def _located(shard: Shard, directory: Path) -> Shard:
    """Return the shard with its path as it is now: a listing lies inside the prepared folder, wherever that is."""
    return replace(shard, path=str(directory / LISTING)) if shard.path == LISTING else shard


def _check_shard(shard: Shard, again: str) -> None:
    if files.is_remote(shard.path):
        return
    try:
        now = os.stat(shard.path).st_size
    except OSError:
        raise UserError(f"the shard '{shard.path}' is gone: put it back, or {again}.") from None
    if now != shard.size:
        raise UserError(f"the shard '{shard.path}' has changed from {shard.size:,} to {now:,} bytes: {again}.")
