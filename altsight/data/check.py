"""`altsight check`: the report before a run, from a look at the images and captions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from altsight.core.errors import UserError
from altsight.data.facts import LONG, SHARED_BY, SMALL, CaptionFacts, ImageFacts, caption_facts, faults, image_facts
from altsight.data.loader import check_batch
from altsight.data.measure import Measured, measure
from altsight.data.mixture import Mixture
from altsight.data.prepared import Prepared, read_contents
from altsight.data.sources import Interleaves, Source
from altsight.data.survey import Progress, silent, spread

RARE = 10
"""Samples of a class below which it can hardly be learned or measured."""
FEW_STEPS = 10
"""Steps of one pass over the data below which the batch is large for them."""


@dataclass(frozen=True)
class Report:
    """What `check` found; `dataclasses.asdict` makes JSON of it."""

    directory: str
    kind: str
    """pairs, documents or mixture."""
    samples: int
    looked_at: int
    """Samples that images, captions and classes were counted on."""
    is_remote: bool
    """Whether samples are read over a network."""
    shards: dict[str, int]
    """Samples of every shard; in a mixture, of every source, by its folder relative to that of the mixture."""
    weights: dict[str, float]
    """Share in [0, 1] of a run that every source of a mixture gives; {} where the data are no mixture."""
    images: ImageFacts
    captions: CaptionFacts
    classes: dict[str, int]
    """Samples of every class."""
    batch: int
    samples_seen: int
    steps: int
    passes: float
    warnings: tuple[str, ...] = ()


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
    labels = measured.images["label"]
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
    kind, weights, steps = _kind(source), _weights(prepared), samples // batch
    report = Report(
        directory=str(prepared.directory),
        kind=kind,
        samples=size,
        looked_at=len(looked_at),
        is_remote=source.is_remote,
        shards=dict(zip(weights or source.parts(), source.parts().values(), strict=True)),
        weights=weights,
        images=image_facts(measured, len(looked_at)),
        captions=caption_facts(measured, source, len(looked_at), context, as_documents=kind == "documents"),
        classes=dict(zip(source.classes, counts.tolist(), strict=True)),
        batch=batch,
        samples_seen=steps * batch,
        steps=steps,
        passes=steps * batch / size,
    )
    return replace(report, warnings=_warnings(report))


def _kind(source: Source) -> str:
    if isinstance(source, Mixture):
        return "mixture"
    return "documents" if isinstance(source, Interleaves) and not source.as_pairs else "pairs"


def _weights(prepared: Prepared) -> dict[str, float]:
    """Return folder -> share of a run, for a mixture; {} for all else."""
    if not isinstance(prepared.source, Mixture):
        return {}
    weights = read_contents(prepared.directory).mixture
    return {folder: weight / sum(weights.values()) for folder, weight in weights.items()}


def _require_usable(measured: Measured, prepared: Prepared, looked_at: int) -> None:
    usable = set(measured.images["sample"][measured.images["height"] > 0].tolist())
    if prepared.tokenizer:
        usable &= set(measured.captions["sample"].tolist())
    if not usable:
        worst = next(iter(faults(measured.broken)), None)
        why = f"broken image: {worst.reason}, first at {worst.place}" if worst else "no caption"
        raise UserError(
            f"none of the {looked_at:,} samples of '{prepared.directory}' that were looked at can be trained on "
            f"({why}): download the data again, or prepare other data."
        )


def _warnings(report: Report) -> tuple[str, ...]:
    """Say in plain words what about the data is likely to hurt a run."""
    found = [f"{share:.1%} of the {what}." for share, limit, what in _shares(report) if share > limit]
    rare = sum(count < RARE for count in report.classes.values())
    if rare and report.looked_at == report.samples:
        have = "has" if rare == 1 else "have"
        found.append(f"{rare:,} of the {len(report.classes):,} classes {have} fewer than {RARE} samples.")
    if report.samples < FEW_STEPS * report.batch:
        steps = report.samples / report.batch
        found.append(f"A pass over the data is only {steps:.1f} steps: a batch of {report.batch:,} is large for them.")
    return tuple(found)


def _shares(report: Report) -> list[tuple[float, float, str]]:
    """Return (share in [0, 1], up to where it is harmless, what it is a share of)."""
    images, captions = report.images, report.captions
    shares = [(images.unusable / report.looked_at, 0.01, "samples have no usable image; others take their place")]
    if report.kind != "pairs":
        shares.append((images.broken / (images.count + images.broken), 0.01, "images are broken"))
    shares += [
        (images.copies / images.count, 0.05, "images are copies of another one, byte for byte"),
        (images.lookalikes / images.count, 0.1, "images look like another one"),
        (images.small, 0.05, f"images have a side shorter than {SMALL} pixels"),
        (images.long, 0.05, f"images are more than {LONG:g} times as long as wide; crops miss most of them"),
    ]
    if captions.count:
        text = "captions" if report.kind == "pairs" else "texts"
        read = "documents" if report.kind == "documents" else text
        shares += [
            (
                captions.missing / report.looked_at,
                0.05,
                f"samples have no {text}; methods that need them replace such samples",
            ),
            (captions.truncated, 0.05, f"{read} take more than {captions.context} tokens and are cut"),
            (captions.shared, 0.2, f"{text} are shared by more than {SHARED_BY} samples and say little of each"),
        ]
    return shares
