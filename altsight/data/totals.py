"""What the passes over all shards of a corpus add up to, and whether that can be trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.record import BrokenSample
from altsight.data.scan import MOST_CLASSES, Reading, Scanned
from altsight.data.sources import Source
from altsight.data.survey import spread

PROBED = 32
"""Samples whose image is looked for before a data set whose images lie elsewhere is accepted."""


def counts(scanned: Sequence[Scanned]) -> dict[str, int]:
    """Return the numbers of samples, of samples with a text, of texts, and of records that were left out."""
    return {
        "samples": sum(found.shard.samples for found in scanned),
        "with_caption": sum(found.captioned for found in scanned),
        "captions": sum(found.captions for found in scanned),
        "left_out": sum(found.left_out for found in scanned),
    }


def classes(scanned: Sequence[Scanned]) -> tuple[str, ...]:
    """Return the names of all classes, sorted."""
    return tuple(sorted({name for found in scanned for name in found.classes}))


def digest(scanned: Sequence[Scanned], *settings: Any) -> str:
    """Return 12 hex digits over the content of shards, their names and the settings."""
    total = hashlib.sha256()
    for found in scanned:
        total.update(f"{os.path.basename(found.shard.path)} {found.digest}\n".encode())
    total.update(repr(settings).encode())
    return total.hexdigest()[:12]


def require(scanned: Sequence[Scanned], where: str, reading: Reading, needs_text: bool) -> None:
    """Raise UserError if there is no sample, or none has the text or the label that is asked for."""
    found = counts(scanned)
    known = ", ".join(sorted({name for one in scanned for name in one.fields})) or "none found"
    if not found["samples"]:
        raise UserError(
            f"the shards of '{where}' hold no image: altsight reads tar members named KEY.jpg, KEY.png or KEY.webp, "
            "tables with a column of images or their paths (name it with --image), and documents that name images."
        )
    if needs_text and not found["captions"]:
        raise UserError(
            f"none of the {found['samples']:,} images in '{where}' has a caption: give --captions templates over the "
            f"fields that its samples have ({known}), for example '{{title}}', or --images-only."
        )
    names = classes(scanned)
    if reading.label and not names:
        raise UserError(
            f"no sample of '{where}' has the label field '{reading.label}': give --label a field that its samples "
            f"have ({known})."
        )
    if len(names) > MOST_CLASSES:
        raise UserError(f"the field '{reading.label}' has more than {MOST_CLASSES:,} values, so it is no label.")


def require_images(source: Source) -> None:
    """Raise UserError if of the first samples none has an image that can be read."""
    reason = ""
    for i in spread(len(source), PROBED).tolist()[:PROBED]:
        try:
            source.document(i, key(0, i))
            return
        except BrokenSample as error:
            reason = str(error)
    raise UserError(
        f"no image of the samples that were tried can be found ({reason}): give --images the folder, or the shards, "
        "that hold them."
    )
