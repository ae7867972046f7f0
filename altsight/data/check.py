"""`altsight check`: the report before a run, from a look at the images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from altsight.core.errors import UserError
from altsight.data.loader import check_batch
from altsight.data.measure import Measured, measure, text_hash
from altsight.data.prepared import Prepared
from altsight.data.sources import Source
from altsight.data.survey import PERCENTILES, Progress, percentiles, silent, spread

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5
"""How many broken images, frequent captions, shards and classes are named."""
SHARED_BY = 10
"""A caption on more images than this says little about any of them (ALIGN, arXiv 2102.05918, section 3)."""
LONG = 3.0
"""Longer to shorter side above which a square crop misses most of the picture (ALIGN's limit)."""
SMALL = 64
"""Pixels of the shorter side below which there is little to see."""


@dataclass(frozen=True)
class ImageFacts:
    """The images. Shares are in [0, 1] of those that can be decoded; percentiles are named "p0" ... "p100"."""

    broken: int
    broken_names: tuple[str, ...]
    """The first few, as 'shard.tar#offset (fault)'."""
    copies: int
    """Images whose bytes are those of an earlier one."""
    lookalikes: int
    """Further images with the 8 x 8 difference hash of an earlier one."""
    shorter_side: dict[str, float]
    aspect_ratio: dict[str, float]
    """Longer to shorter side."""
    small: float
    """Share whose shorter side has less than SMALL pixels."""
    long: float
    """Share whose aspect ratio is over LONG."""


@dataclass(frozen=True)
class CaptionFacts:
    """The captions; a sample may have several. Shares are in [0, 1] of all captions."""

    count: int
    missing: int
    """Samples without a caption."""
    characters: dict[str, float]
    tokens: dict[str, float]
    context: int
    truncated: float
    """Share that takes more than `context` tokens."""
    repeated: float
    """Share that repeats an earlier caption word for word."""
    shared: float
    """Share that stands on more than SHARED_BY images."""
    frequent: dict[str, int]
    """The most frequent ones that occur more than once."""


@dataclass(frozen=True)
class Report:
    """What `check` found; `dataclasses.asdict` makes JSON of it."""

    directory: str
    samples: int
    looked_at: int
    """Samples that all that follows was counted on."""
    shards: dict[str, int]
    """Samples of every shard (of every source, in a mixture)."""
    images: ImageFacts
    captions: CaptionFacts
    classes: dict[str, int]
    """Samples of every class."""
    batch: int
    samples_seen: int
    steps: int
    passes: float
    warnings: tuple[str, ...]


def check(
    prepared: Prepared,
    batch: int,
    samples: int,
    workers: int = 0,
    progress: Progress = silent,
    context: int = 77,
    most: int = 0,
) -> Report:
    """Look at the samples of `prepared` and say what a run will meet.

    Args:
        prepared: the data set.
        batch: global batch of the run.
        samples: samples seen by the run.
        workers: processes that decode; 0 decodes in this one.
        progress: called with what is being done, how much of it is done, and how much there is.
        context: tokens of the text tower, start and end included.
        most: samples to look at, in blocks spread over the data; 0: all.

    Raises:
        UserError: it cannot be trained on: no sample has an image that can be decoded (and a caption, where the data
            were prepared with text), or the batch is larger than the data set or the run.
    """
    source, size = prepared.source, len(prepared.source)
    check_batch(batch, size, str(prepared.directory))
    if samples < batch:
        raise UserError(f"a run of {samples:,} samples is shorter than one batch of {batch:,}: use more samples.")
    looked_at = spread(size, most or size).tolist()
    measured = measure(source, looked_at, prepared.tokenizer, workers, progress)
    _require_usable(measured, prepared, len(looked_at))
    images, captions = _image_facts(measured), _caption_facts(measured, source, len(looked_at), context)
    counts = np.bincount(measured.images["label"][measured.images["label"] >= 0], minlength=len(source.classes))
    steps = samples // batch
    return Report(
        directory=str(prepared.directory),
        samples=size,
        looked_at=len(looked_at),
        shards=source.parts(),
        images=images,
        captions=captions,
        classes=dict(zip(source.classes, counts.tolist(), strict=True)),
        batch=batch,
        samples_seen=steps * batch,
        steps=steps,
        passes=steps * batch / size,
        warnings=_warnings(images, captions, len(measured.images), len(looked_at)),
    )


def _require_usable(measured: Measured, prepared: Prepared, looked_at: int) -> None:
    usable = set(measured.images["sample"][measured.images["height"] > 0].tolist())
    if prepared.tokenizer:
        usable &= set(measured.captions["sample"].tolist())
    if not usable:
        fault = f"broken image: {measured.broken[0]}" if measured.broken else "no caption"
        raise UserError(
            f"none of the {looked_at:,} samples of '{prepared.directory}' can be trained on ({fault}): download the "
            "data again, or prepare other data."
        )


def _image_facts(measured: Measured) -> ImageFacts:
    images = measured.images[measured.images["height"] > 0]
    distinct = images[np.unique(images["content"], return_index=True)[1]]
    shorter = np.minimum(images["height"], images["width"])
    aspect = np.maximum(images["height"], images["width"]) / shorter
    return ImageFacts(
        broken=len(measured.broken),
        broken_names=measured.broken[:SHOWN],
        copies=len(images) - len(distinct),
        lookalikes=len(distinct) - len(np.unique(distinct["looks"])),
        shorter_side=percentiles(shorter),
        aspect_ratio=percentiles(aspect),
        small=float((shorter < SMALL).mean()),
        long=float((aspect > LONG).mean()),
    )


def _caption_facts(measured: Measured, source: Source, looked_at: int, context: int) -> CaptionFacts:
    captions = measured.captions
    total = max(1, len(captions))
    hashes, first, counts = np.unique(captions["content"], return_index=True, return_counts=True)
    ranked = [k for k in np.argsort(-counts, kind="stable")[:SHOWN] if counts[k] > 1]
    return CaptionFacts(
        count=len(captions),
        missing=looked_at - len(np.unique(captions["sample"])),
        characters=percentiles(captions["characters"]),
        tokens=percentiles(captions["tokens"]),
        context=context,
        truncated=float((captions["tokens"] > context).sum() / total),
        repeated=(len(captions) - len(hashes)) / total,
        shared=float(counts[counts > SHARED_BY].sum() / total),
        frequent={_words(source, captions["sample"][first[k]], hashes[k]): int(counts[k]) for k in ranked},
    )


def _words(source: Source, sample: np.int64, content: np.uint64) -> str:
    """Return the caption of `sample` whose hash is `content`, read again."""
    return next(text for text in source.texts(int(sample)) if text_hash(text) == content)


def _warnings(images: ImageFacts, captions: CaptionFacts, count: int, looked_at: int) -> tuple[str, ...]:
    """Say in plain words what about the data is likely to hurt a run; `count` images of `looked_at` samples."""
    facts = [(images.broken / count, 0.01, "of the images are broken; other samples take their place")]
    usable = count - images.broken
    facts += [
        (images.copies / usable, 0.05, "of the images are copies of another one, byte for byte"),
        (images.lookalikes / usable, 0.1, "more look like another one"),
        (images.small, 0.05, f"of the images have a side shorter than {SMALL} pixels"),
        (images.long, 0.05, f"of the images are more than {LONG:g} times as long as wide; crops miss most of them"),
    ]
    if captions.count:
        facts += [
            (captions.missing / looked_at, 0.05, "of the samples have no caption; methods that need text replace them"),
            (captions.truncated, 0.05, f"of the captions take more than {captions.context} tokens and are cut"),
            (captions.shared, 0.2, f"of the captions stand on more than {SHARED_BY} images and say little of each"),
        ]
    return tuple(f"{share:.1%} {what}." for share, limit, what in facts if share > limit)


def show(report: Report, console: Console) -> None:
    """Print `report` as tables, its warnings, and what the run will do."""
    from rich.markup import escape

    images, captions = report.images, report.captions
    _table(console, f"{report.samples:,} samples in {len(report.shards):,} shards", _first(report.shards))
    if report.looked_at < report.samples:
        console.print(f"What follows was counted on {report.looked_at:,} samples, in blocks spread over the data.\n")
    faults = {"broken": images.broken, "copies of another": images.copies, "look like another": images.lookalikes}
    _table(console, "Images", faults)
    if captions.count:
        shares = {
            "repeat another": captions.repeated,
            f"on more than {SHARED_BY} images": captions.shared,
            f"over {captions.context} tokens": captions.truncated,
        }
        counts = {"captions": f"{captions.count:,}", "samples without": f"{captions.missing:,}"}
        _table(console, "Captions", counts | {name: f"{share:.1%}" for name, share in shares.items()})
    if captions.frequent:
        _table(console, "Most frequent captions", captions.frequent)
    if report.classes:
        ranked = dict(sorted(report.classes.items(), key=lambda item: -item[1]))
        _table(console, f"{len(ranked):,} classes", _first(ranked))
    _percentile_table(console, report)
    for name in images.broken_names:
        console.print(f"[red]broken image[/] {escape(name)}", highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]note[/] {warning}")
    console.print(
        f"[bold]{report.samples_seen:,} samples seen = {report.steps:,} steps of batch {report.batch:,} = "
        f"{report.passes:.2f} passes over the data[/]"
    )


def _first(counts: dict[str, int]) -> dict[str, int]:
    """Return the first few of `counts` and the sum of the others."""
    names = list(counts)
    if len(names) <= SHOWN + 1:
        return counts
    rest = names[SHOWN:]
    return {name: counts[name] for name in names[:SHOWN]} | {f"{len(rest):,} more": sum(counts[n] for n in rest)}


def _table(console: Console, title: str, rows: Mapping[str, int | str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=60)
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(Text(name), value if isinstance(value, str) else f"{value:,}")
    console.print(f"[bold]{title}[/]", table, "")


def _percentile_table(console: Console, report: Report) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    for p in PERCENTILES:
        table.add_column({0: "least", 50: "median", 100: "most"}.get(p, f"{p} %"), justify="right")
    rows = {
        "shorter side, pixels": report.images.shorter_side,
        "longer / shorter side": report.images.aspect_ratio,
        "caption, characters": report.captions.characters,
        "caption, tokens": report.captions.tokens,
    }
    for name, values in rows.items():
        if values:
            table.add_row(name, *(f"{v:,.4g}" if v < 1000 else f"{v:,.0f}" for v in values.values()))
    console.print("[bold]Percentiles[/]", table, "")
