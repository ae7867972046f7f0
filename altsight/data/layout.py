"""What a user points at -> the shards in it: tars, tables, documents, or a folder of images."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from altsight.core.errors import UserError
from altsight.data import files
from altsight.data.index import Shard
from altsight.data.lines import read_header
from altsight.data.record import IMAGE_SUFFIXES

KINDS = {
    **{"tar": "tar", "parquet": "parquet", "arrow": "arrow", "jsonl": "jsonl", "ndjson": "jsonl"},
    **{"csv": "csv", "tsv": "tsv"},
}
"""File suffix -> kind of shard. Of a folder that holds several kinds the first is read: img2dataset leaves Parquet
metadata beside its tars."""
LISTING = "images.jsonl"
"""The list of a folder of images, written into the prepared folder: the path of each below the folder, its label."""


@dataclass(frozen=True)
class Layout:
    """The shards of a source, in order. root: the folder that images lie in which the shards only name.

    images_alone: it is a folder of images, so there is no text to ask for. labelled: each class has a folder.
    """

    shards: tuple[Shard, ...]
    root: str
    images_alone: bool = False
    labelled: bool = False


def find_layout(source: str, image_field: str = "", listing: Path | None = None) -> Layout:
    """Return the shards that `source` names: files, patterns, a folder, local or remote.

    listing: where the list of images is written if it is a folder of images; without it, to a temporary file that
    lives as long as this process.

    Raises:
        UserError: nothing is there that can be read.
    """
    if not files.is_remote(source) and Path(source).is_dir():
        _refuse_splits(Path(source))
        if not any(_kind(name) for name in os.listdir(source)):
            return _image_folder(source, listing or _temporary_listing())
    paths = files.expand(source, tuple(KINDS))
    kind = next(kind for kind in KINDS.values() if any(_kind(path) == kind for path in paths))
    paths = [path for path in paths if _kind(path) == kind]
    if kind == "arrow":
        paths = _saved_data_set(paths)
    if not files.is_remote(paths[0]):
        paths = [os.path.abspath(path) for path in paths]
    shards = map(_shard, paths, files.stamps(paths), itertools.repeat(kind), itertools.repeat(image_field))
    return Layout(tuple(shards), files.parent(paths[0]))


def find_image_shards(source: str, image_field: str = "") -> tuple[Shard, ...]:
    """Return the shards of images that `source` names; () where it is a folder of loose images.

    Raises:
        UserError: nothing is there.
    """
    holding = ("tar", "parquet", "arrow")
    if (
        not files.is_remote(source)
        and Path(source).is_dir()
        and not any(_kind(n) in holding for n in os.listdir(source))
    ):
        return ()
    if files.is_remote(source) and source.endswith("/"):
        return ()
    return find_layout(source, image_field).shards


def _kind(path: str) -> str | None:
    return KINDS.get(files.suffix(path))


def _shard(path: str, stamp: files.Stamp, kind: str, image_field: str) -> Shard:
    header: tuple[str, ...] = ()
    if kind in ("csv", "tsv"):
        with files.open_stream(path) as stream:
            header = read_header(path, kind, stream)
    return Shard(path, kind, stamp.size, stamp.version, header=header, image_field=image_field)


def _refuse_splits(folder: Path) -> None:
    """A saved DatasetDict has a folder for each split; which one is wanted only the user knows."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise UserError(f"'{folder}' holds several splits ({splits}): give the folder of one, as '{folder}/train'.")


def _saved_data_set(paths: list[str]) -> list[str]:
    """Return the data files of a folder that `datasets` saved, without the caches that lie beside them."""
    state = Path(files.parent(paths[0])) / "state.json"
    if files.is_remote(paths[0]) or len(paths) == 1 or not state.is_file():
        return paths
    named = {entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8")).get("_data_files", [])}
    return [path for path in paths if os.path.basename(path) in named] or paths


def _image_folder(source: str, listing: Path) -> Layout:
    """List the images below a folder; where every one lies in a subfolder, the first subfolder is its label."""
    found = list(_images_below(source))
    if not found:
        raise UserError(
            f"the folder '{source}' holds no shard ({', '.join('.' + kind for kind in KINDS)}) and no image: give the "
            "folder that the download wrote its files to."
        )
    labelled = all(os.sep in path for path in found)
    with listing.open("w", encoding="utf-8") as file:
        for path in found:
            row = {"path": path} | ({"label": path.partition(os.sep)[0]} if labelled else {})
            file.write(json.dumps(row) + "\n")
    shard = _shard(str(listing), files.stamp(str(listing)), "jsonl", "path")
    return Layout((shard,), os.path.abspath(source), True, labelled)


def _temporary_listing() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="altsight-")
    atexit.register(folder.cleanup)
    return Path(folder.name) / LISTING


def _images_below(folder: str) -> Iterator[str]:
    """Yield the path of every image below `folder`, relative to it, sorted; hidden files and folders are left out."""
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith(".") and files.suffix(name) in IMAGE_SUFFIXES:
                yield os.path.relpath(os.path.join(home, name), folder)
