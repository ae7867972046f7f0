"""`altsight prepare`: shards -> index, tokenizer and statistics, which every run on the data starts from.

The shards stay where they are. The folder that is written appears whole or not at all; shards that were read before
an interruption are not read again, nor are those that a folder already knows when more are added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from altsight.core.config import to_dict
from altsight.core.errors import UserError
from altsight.data import files, totals
from altsight.data.cache import Cache
from altsight.data.captions import Captions
from altsight.data.documents import Sampling, read_document
from altsight.data.folder import appears_whole, check_out, home_of, writing
from altsight.data.images import Folder
from altsight.data.index import Index, Rows, Shard, open_index
from altsight.data.layout import LISTING, Layout, find_image_shards, find_layout
from altsight.data.parts import Parts
from altsight.data.prepared import (
    DATASET,
    INDEX,
    NAMES,
    STORE,
    TOKENIZER,
    WRITTEN,
    Contents,
    Prepared,
    open_prepared,
    read_contents,
    read_shards,
    write_contents,
    write_shards,
)
from altsight.data.scan import Reading, Scanned, first_record, scan_shard
from altsight.data.sources import Pairs, Source
from altsight.data.survey import SURVEYED, Progress, Survey, percentiles, silent, spread
from altsight.data.text import Tokenizer, load_tokenizer, train_tokenizer

KEPT_BYTES = 2**32
"""Size of the cache that `prepare` itself uses."""


@dataclass(frozen=True)
class PrepareConfig:
    """What `altsight prepare` reads and writes."""

    source: Positional[str]
    """A file (tar, parquet, arrow, csv, tsv, jsonl), a folder of them, a quoted pattern, or a folder of images."""
    out: Path
    """The folder to write; one that was prepared before is replaced, and shards that it knows are not read again."""
    captions: tuple[str, ...] = ("{txt}",)
    """Templates over the text and the fields of a sample: "{title}, {tags}"; "{captions[]}" makes one of each entry."""
    label: str = ""
    """Field with the class of a sample; in a folder with a folder for each class it is "label"."""
    tokenizer: str = ""
    """A tokenizer.json file or a Hugging Face name; empty: one is trained on the captions."""
    vocab_size: int = 8192
    """Size of the trained tokenizer."""
    images_only: bool = False
    """Leave the text aside; otherwise data without a caption are an error."""
    image: str = ""
    """Column of a table that holds the image or its path; empty: the usual names are looked for."""
    images: str = ""
    """Where images lie that the source only names: a folder (a remote one ends in "/") or shards; empty: beside it."""
    as_pairs: bool = False
    """Interleaved documents: serve one image with its sentence, for methods that learn from pairs."""
    min_similarity: float = 0.24
    """Interleaved documents: leave out images that agree less with their sentence."""
    max_images: int = 6
    """Interleaved documents: use the first so many images of each."""
    workers: int = 0
    """Processes that read shards; 0: one a core."""
    skip_damaged: bool = False
    """Leave shards out that cannot be read, instead of refusing them."""

    @property
    def sampling(self) -> Sampling:
        """How documents are drawn."""
        return Sampling(self.min_similarity, self.max_images)

    @property
    def processes(self) -> int:
        """Processes that read shards."""
        return self.workers or os.cpu_count() or 1

    @property
    def needs_text(self) -> bool:
        """Whether data without a caption are an error."""
        return bool(self.captions) and not self.images_only

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the same folder must have been prepared with to be added to."""
        free = {"source", "out", "workers", "skip_damaged"}
        return {name: value for name, value in to_dict(self).items() if name not in free}


def prepare(config: PrepareConfig, progress: Progress = silent) -> Prepared:
    """Index the shards, train or load the tokenizer, and write both with the statistics to `config.out`.

    Raises:
        UserError: the source, the captions, the label or the tokenizer cannot be used, or `out` cannot be written or
            holds something else. Nothing is left behind then but what is known of whole shards, in a hidden folder
            beside `out` that the next call takes up; it is removed when that is done.
    """
    check_out(config.out, DATASET, WRITTEN)
    Captions(config.captions)
    known = load_tokenizer(config.tokenizer) if config.tokenizer and not config.images_only else None
    work = home_of(config.out) / f".{config.out.resolve().name}.parts"
    with appears_whole(config.out) as folder:
        layout = find_layout(config.source, config.image, folder / LISTING)
        parts = Parts(work, _reading(config, layout), _old_rows(config))
        scanned = parts.scan(layout.shards, config.processes, config.skip_damaged, progress)
        try:
            totals.require(scanned, config.source, parts.reading, config.needs_text and not layout.images_alone)
            contents = _write(config, folder, layout, parts, scanned, progress)
            # Remote blocks and row groups that the look at the data takes twice are fetched once.
            source = open_prepared(folder).source.cached(Cache(work / "blocks", KEPT_BYTES))
            _complete(config, folder, source, contents, known or _old_tokenizer(config, parts), progress)
        except UserError:
            parts.remove()
            raise
    parts.remove()
    return open_prepared(config.out)


def read_pairs(source: str, captions: Sequence[str] = ("{txt}",), label: str = "") -> Pairs:
    """Index the pairs that `source` names in memory and write nothing, for data that is only evaluated with.

    Raises:
        UserError: the source, the captions or the label cannot be used.
    """
    reading = Reading(Captions(tuple(captions)), label)
    layout = find_layout(source)
    reading = replace(reading, label=label or ("label" if layout.labelled else ""))
    rows: list[Rows] = []
    scanned = [scan_shard(shard, reading, rows.append) for shard in layout.shards]
    totals.require(scanned, source, reading, needs_text=False)
    index = Index(tuple(found.shard for found in scanned), np.concatenate(rows))
    return Pairs(index, reading.captions, label, totals.classes(scanned), Folder(layout.root))


def _reading(config: PrepareConfig, layout: Layout) -> Reading:
    """Return what to look for: documents where the first record is one; no text in a folder of images."""
    records = (first_record(shard) for shard in layout.shards if shard.kind in ("jsonl", "parquet", "arrow"))
    first = next((record for record in records if record is not None), None)
    documents = first is not None and read_document(first.fields) is not None
    captions = Captions(() if config.images_only or layout.images_alone else config.captions)
    return Reading(captions, config.label or ("label" if layout.labelled else ""), documents)


def _old_rows(config: PrepareConfig) -> dict[str, tuple[Scanned, Rows]]:
    """Return what a folder that was prepared with the same settings knows: path -> shard and rows."""
    try:
        if read_contents(config.out).settings != config.settings:
            return {}
        scanned = read_shards(config.out)
        index = open_index([found.shard for found in scanned], config.out / INDEX, "")
    except UserError:
        return {}
    pieces = np.split(index.rows, index.starts[1:-1])
    return {found.shard.path: (found, rows) for found, rows in zip(scanned, pieces, strict=True)}


def _old_tokenizer(config: PrepareConfig, parts: Parts) -> Tokenizer | None:
    """Return the tokenizer of the folder that shards are added to: encoders trained on its data still fit then."""
    path = config.out / TOKENIZER
    return load_tokenizer(str(path)) if parts.old and path.exists() else None


def _write(
    config: PrepareConfig, folder: Path, layout: Layout, parts: Parts, scanned: list[Scanned], progress: Progress
) -> Contents:
    """Write all but the tokenizer and the statistics of the text, for which the data have to be open."""
    reading = parts.reading
    with writing(config.out):
        parts.write_index(scanned, folder / INDEX)
        write_shards(folder, [_relative(found, folder) for found in scanned])
    root = _beside(layout.root) if reading.documents else layout.root
    if config.images:
        shards = find_image_shards(config.images, config.image)
        place = config.images if files.is_remote(config.images) else os.path.abspath(config.images)
        root = "" if shards else place
        if shards:
            _write_store(config, folder / STORE, shards, progress)
    sampling = config.sampling if reading.documents else None
    contents = Contents(
        kind="documents" if reading.documents else "pairs",
        digest=totals.digest(scanned, reading, sampling, config.as_pairs),
        statistics=totals.counts(scanned),
        settings=config.settings,
        captions=reading.captions.templates,
        label=reading.label,
        classes=totals.classes(scanned),
        root=root,
        sampling=config.sampling,
        as_pairs=config.as_pairs,
    )
    write_contents(folder, contents)
    return contents


def _beside(root: str) -> str:
    """Return the folder `images` beside documents where there is one, otherwise the one that the documents lie in."""
    folder = os.path.join(root, "images")
    return folder if not files.is_remote(root) and os.path.isdir(folder) else root


def _write_store(config: PrepareConfig, store: Path, shards: Sequence[Shard], progress: Progress) -> None:
    """Write an index by name over the shards that hold the images."""
    store.mkdir()
    parts = Parts(store / "parts", Reading(Captions(()), named=True))
    scanned = parts.scan(shards, config.processes, config.skip_damaged, progress)
    with writing(config.out):
        parts.write_index(scanned, store / INDEX)
        parts.write_names(scanned, store / NAMES)
        write_shards(store, scanned)
    parts.remove()


def _complete(
    config: PrepareConfig,
    folder: Path,
    source: Source,
    contents: Contents,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> None:
    """Look at the data as a run will see them; add the tokenizer and the statistics of the text."""
    totals.require_images(source)
    survey = Survey(source, progress)
    if tokenizer is None and contents.statistics["captions"]:
        tokenizer = train_tokenizer(survey.texts(), config.vocab_size)
    rows = np.load(folder / INDEX, mmap_mode="r")
    statistics = contents.statistics | {
        **survey.statistics(tokenizer),
        "sample_bytes": percentiles(rows["size"][spread(len(rows), SURVEYED)]),
    }
    with writing(config.out):
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
        write_contents(folder, replace(contents, statistics=statistics, tokenizer=tokenizer is not None))


def _relative(found: Scanned, folder: Path) -> Scanned:
    """Name the list of a folder of images by its file name: the prepared folder may be moved."""
    inside = Path(found.shard.path).parent == folder
    return replace(found, shard=replace(found.shard, path=LISTING)) if inside else found
