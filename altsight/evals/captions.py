"""Captions of a test split, by the decoder that a view has, against the captions that the split holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from altsight.core.dist import gather_objects, world
from altsight.data.decode import BrokenImage
from altsight.evals.base import Result, Split, Task, View, not_applicable
from altsight.evals.caption_metrics import METRICS, CaptionMetric, Score, caption_scores
from altsight.evals.features import captions_of, content_hash, join_notes, left_out
from altsight.nn.decoding import BEAM, Decoding
from altsight.train.log import progress_bar
from altsight.train.parallel import precision


@dataclass(frozen=True)
class Captioned:
    """An image, the caption that was written for it, and those that it has."""

    image: str
    """Where it lies."""
    caption: str
    references: tuple[str, ...]
    digest: str
    """SHA-256 of the image."""


def captions(view: View, task: Task) -> Iterator[Result]:
    """Yield all caption metrics on the test split, decoded with a beam of 5: the same for every decoder."""
    if not any(captions_of(task.test)):
        return
    if view.caption is None:
        for metric in METRICS:
            result = not_applicable(view, task, "captions", metric)
            yield replace(result, note="not applicable: these weights write no captions")
        return
    yield from score_captions(view, task.name, task.test, write_captions(view, task.test, BEAM), BEAM)


def write_captions(view: View, split: Split, decoding: Decoding) -> list[Captioned]:
    """Return a caption of every distinct image of `split` that can be decoded; each rank writes its part.

    Samples with the same image (a table with a row for each caption) are one, with the references of all of them.
    """
    assert view.caption is not None, "only a view with a decoder writes captions"
    references, place = captions_of(split), world()
    mine = range(place.rank * len(split) // place.size, (place.rank + 1) * len(split) // place.size)
    written: list[Captioned] = []
    with progress_bar(transient=True) as bar:
        shown = bar.add_task("captions", total=len(mine), note="")
        for start in range(mine.start, mine.stop, view.batch_size):
            part = range(start, min(start + view.batch_size, mine.stop))
            written += _write(view, split, part, references, decoding)
            bar.advance(shown, len(part))
    found: dict[str, Captioned] = {}
    for one in (one for part in gather_objects(written) for one in part):
        first = found.setdefault(one.digest, one)
        found[one.digest] = replace(first, references=tuple(dict.fromkeys(first.references + one.references)))
    return list(found.values())


def score_captions(
    view: View,
    task: str,
    split: Split,
    written: Sequence[Captioned],
    decoding: Decoding,
    metrics: Sequence[CaptionMetric] = METRICS,
) -> list[Result]:
    """Return the metrics of captions that `write_captions` wrote; images without a reference are left out.

    Raises:
        UserError: pycocoevalcap is missing, or no image has a reference.
    """
    used = [one for one in written if one.references]
    # The whole set on one rank: METEOR and SPICE take gigabytes each.
    scores: list[Score] = gather_objects(_scores(used, metrics) if world().is_main else [])[0]
    references = sum(len(one.references) for one in used)
    note = left_out(split, {"no caption": len(written) - len(used)})
    return [
        Result(
            task,
            "captions",
            score.metric,
            score.value,
            score.low,
            score.high,
            score.chance,
            n=len(used),
            split=split.name,
            feature_point="patch tokens",
            preprocess=view.preprocess.hash(),
            data=content_hash((one.digest, list(one.references)) for one in used),
            note=join_notes(score.note, note),
            extra={"seed": decoding.seed, "decoding": asdict(decoding), "references": references},
        )
        for score in scores
    ]


def _scores(used: Sequence[Captioned], metrics: Sequence[CaptionMetric]) -> list[Score]:
    return caption_scores([one.caption for one in used], [one.references for one in used], metrics)


def _write(
    view: View, split: Split, samples: range, references: list[list[str]], decoding: Decoding
) -> list[Captioned]:
    read = []
    for i in samples:
        try:
            data = split.source.image(i)
            read.append((i, hashlib.sha256(data).hexdigest(), view.preprocess(data)))
        except BrokenImage:
            continue
    distinct = {digest: pixels for _, digest, pixels in read}
    if not distinct:
        return []
    assert view.caption is not None
    with precision(view.device, view.dtype):
        texts = view.caption(torch.stack(list(distinct.values())).to(view.device), decoding=decoding)
    said = dict(zip(distinct, texts, strict=True))
    return [Captioned(split.source.name(i), said[digest], tuple(references[i]), digest) for i, digest, _ in read]
