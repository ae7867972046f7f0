"""What `altsight check` counts from the samples that were measured: facts about their images and captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from altsight.data.measure import Broken, Measured, text_hash
from altsight.data.sources import Source
from altsight.data.survey import percentiles

FREQUENT = 5
"""Captions that are named because they are the most frequent."""
SHARED_BY = 10
"""A caption of more samples than this says little about any of them (ALIGN, arXiv 2102.05918, section 3)."""
LONG = 3.0
"""Longer to shorter side above which a square crop misses most of the picture (ALIGN's limit)."""
SMALL = 64
"""Pixels of the shorter side below which there is little to see."""


@dataclass(frozen=True)
class Fault:
    """Images that are of no use for the same reason, and where the first of them lies, as 'shard.tar#offset'."""

    count: int
    reason: str
    place: str


@dataclass(frozen=True)
class ImageFacts:
    """The images. Shares are in [0, 1] of those that can be decoded; percentiles are named "p0" ... "p100"."""

    count: int
    """Images that can be decoded, of those that a run would draw from every sample."""
    broken: int
    """Images that cannot, and samples that yield no image at all."""
    faults: tuple[Fault, ...]
    """Why; the most frequent reason comes first."""
    unusable: int
    """Samples without any image that can be decoded."""
    copies: int
    """Images whose bytes are those of an earlier one."""
    lookalikes: int
    """Further images with the 8 x 8 difference hash of an earlier one."""
    per_sample: dict[str, float]
    """Images of a sample that has any."""
    shorter_side: dict[str, float]
    aspect_ratio: dict[str, float]
    """Longer to shorter side."""
    kilobytes: dict[str, float]
    """Encoded size, in units of 1000 bytes."""
    small: float
    """Share whose shorter side has less than SMALL pixels."""
    long: float
    """Share whose aspect ratio is over LONG."""


@dataclass(frozen=True)
class CaptionFacts:
    """The captions, of which a sample may have several; in documents, their texts. Shares are in [0, 1] of all."""

    count: int
    missing: int
    """Samples without a caption."""
    per_sample: dict[str, float]
    """Captions of a sample that has any."""
    characters: dict[str, float]
    """Length of a caption; of all texts of a document together."""
    tokens: dict[str, float]
    """The same in tokens, start and end included; {} where the data have no tokenizer."""
    context: int
    truncated: float
    """Share (of documents, where they are documents) that takes more than `context` tokens."""
    repeated: float
    """Share that repeats an earlier caption word for word."""
    shared: float
    """Share that more than SHARED_BY samples have."""
    frequent: dict[str, int]
    """The most frequent ones that occur more than once."""


def image_facts(measured: Measured, looked_at: int) -> ImageFacts:
    """Count what `measured` says of the images of `looked_at` samples; at least one of them can be decoded."""
    images = measured.images[measured.images["height"] > 0]
    distinct = images[np.unique(images["content"], return_index=True)[1]]
    per_sample = np.unique(images["sample"], return_counts=True)[1]
    shorter = np.minimum(images["height"], images["width"])
    aspect = np.maximum(images["height"], images["width"]) / shorter
    return ImageFacts(
        count=len(images),
        broken=len(measured.broken),
        faults=faults(measured.broken),
        unusable=looked_at - len(per_sample),
        copies=len(images) - len(distinct),
        lookalikes=len(distinct) - len(np.unique(distinct["looks"])),
        per_sample=percentiles(per_sample),
        shorter_side=percentiles(shorter),
        aspect_ratio=percentiles(aspect),
        kilobytes=percentiles(images["bytes"] / 1000),
        small=float((shorter < SMALL).mean()),
        long=float((aspect > LONG).mean()),
    )


def caption_facts(measured: Measured, source: Source, looked_at: int, context: int, as_documents: bool) -> CaptionFacts:
    """Count what `measured` says of the captions of `looked_at` samples of `source`.

    as_documents: the texts of a sample are read together, and not each as a caption of its own.
    """
    captions = measured.captions
    total = max(1, len(captions))
    hashes, first, counts = np.unique(captions["content"], return_index=True, return_counts=True)
    ranked = [k for k in np.argsort(-counts, kind="stable")[:FREQUENT] if counts[k] > 1]
    per_sample = np.unique(captions["sample"], return_counts=True)[1]
    characters, tokens = captions["characters"], captions["tokens"]
    if as_documents and len(captions):
        starts = np.cumsum(per_sample) - per_sample
        characters, tokens = np.add.reduceat(characters, starts), np.add.reduceat(tokens, starts)
    # Start and end are there once, however many texts stand between them.
    tokens = tokens[tokens > 0] + 2
    return CaptionFacts(
        count=len(captions),
        missing=looked_at - len(per_sample),
        per_sample=percentiles(per_sample),
        characters=percentiles(characters),
        tokens=percentiles(tokens),
        context=context,
        truncated=float((tokens > context).sum() / max(1, len(tokens))),
        repeated=(len(captions) - len(hashes)) / total,
        shared=float(counts[counts > SHARED_BY].sum() / total),
        frequent={_words(source, captions["sample"][first[k]], hashes[k]): int(counts[k]) for k in ranked},
    )


def _words(source: Source, sample: np.int64, content: np.uint64) -> str:
    """Return the caption of `sample` whose hash is `content`, read again."""
    return next(text for text in source.texts(int(sample)) if text_hash(text) == content)


def faults(broken: Sequence[Broken]) -> tuple[Fault, ...]:
    """Count how many are broken for the same reason; the most frequent reason comes first."""
    counts = Counter(_kind(one.reason) for one in broken)
    first = {_kind(one.reason): one.place for one in reversed(broken)}
    return tuple(Fault(count, kind, first[kind]) for kind, count in counts.most_common())


def _kind(reason: str) -> str:
    """Return a reason without its names and numbers, which differ between images that are broken in the same way."""
    begins = re.match(r"no image, it begins with b(['\"])(?:\\x..|\\?(?!\1).){0,5}", reason)
    return f"{begins[0]}…" if begins else re.sub(r"'[^']*'|\d[\d,.]*", "…", reason)
