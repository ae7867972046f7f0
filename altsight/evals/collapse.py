"""Collapse meters: how much of its feature space an encoder uses. They need no labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.evals.base import Result, Split, Task, View, not_applicable
from altsight.evals.features import Extracted, captions_of, content_hash, extract, finite, joint_vectors

MAX_IMAGES = 2048
"""The meters read this many images of the test split, evenly spread over it."""
MAX_PAIRS = 512
"""Alignment reads this many of them: each has to be encoded a second time."""
LEAST_RANK = 0.02
LEAST_STD = 0.1


def collapse(view: View, task: Task) -> Iterator[Result]:
    """Yield the meters of the features on the test split; nothing if it has fewer than two images.

    effective_rank: 1 to D. std: 1 if the features spread evenly over all directions, 0 if all are equal. uniformity:
    lower is more even. alignment_flip: between an image and its mirror image. alignment_pairs: between an image and its
    first caption in the joint space of a dual encoder.
    """
    if len(task.test) < 2:
        return
    extracted = extract(view, task.test)
    rows = _spread(len(extracted.kept), MAX_IMAGES)
    if len(rows) < 2:
        return
    vectors = extracted.vectors[rows]
    size, width = vectors.shape
    rank, std = effective_rank(vectors), spread_std(vectors)
    low_rank = f"the features use {rank:.1f} of {width} dimensions" if rank < LEAST_RANK * min(size, width) else ""
    low_std = f"all images get nearly the same features (std {std:.3f} where 1 is even)" if std < LEAST_STD else ""
    some = _spread(len(extracted.kept), MAX_PAIRS)
    flipped = _flipped(view, task.test, extracted, some)
    of_all: dict[str, Any] = {"n": size, "data": content_hash(extracted.digests[row] for row in rows)}
    of_some: dict[str, Any] = {"n": len(some), "data": content_hash(extracted.digests[row] for row in some)}
    for metric, value, warning, fields in (
        ("effective_rank", rank, low_rank, of_all),
        ("std", std, low_std, of_all),
        ("uniformity", uniformity(vectors), "", of_all),
        ("alignment_flip", alignment(extracted.vectors[some], flipped), "", of_some),
    ):
        yield Result(
            task.name,
            "collapse",
            metric,
            value,
            split=task.test.name,
            feature_point=view.feature_point,
            preprocess=view.preprocess.hash(),
            note=f"collapsed: {warning}" if warning else "",
            extra={"dimensions": width},
            **fields,
        )
    yield from _pairs(view, task, extracted)


def effective_rank(vectors: Tensor) -> float:
    """Return exp(entropy of the normalised singular values) of features (n, D), fp64 (Roy and Vetterli 2007).

    Not centred, as in RankMe (Garrido et al. 2023): features that are all equal have rank 1. 0 if all are zero.
    """
    singular = torch.linalg.svdvals(vectors.double())
    if not bool(singular.sum() > 0):
        return 0.0
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def spread_std(vectors: Tensor) -> float:
    """Return sqrt(D) times the mean standard deviation per dimension of the unit features (SimSiam's meter)."""
    unit = F.normalize(vectors.double(), dim=1)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def uniformity(vectors: Tensor) -> float:
    """Return log mean exp(-2 |x - y|^2) over all pairs of unit features (Wang and Isola 2020); 0 if all are equal."""
    distances = torch.pdist(F.normalize(vectors.double(), dim=1))
    return float((-2 * distances.square()).exp().mean().log())


def alignment(a: Tensor, b: Tensor) -> float:
    """Return the mean |a - b|^2 of matching unit vectors (Wang and Isola 2020): 0 if equal, 2 if unrelated."""
    difference = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
    return float(difference.square().sum(dim=1).mean())


def _pairs(view: View, task: Task, extracted: Extracted) -> Iterator[Result]:
    captions = captions_of(task.test)
    if not any(captions):
        return
    if not view.is_dual:
        yield not_applicable(view, task, "collapse", "alignment_pairs")
        return
    described = [row for row, sample in enumerate(extracted.kept) if captions[sample]]
    rows = [described[i] for i in _spread(len(described), MAX_IMAGES)]
    texts = [captions[extracted.kept[row]][0] for row in rows]
    yield Result(
        task.name,
        "collapse",
        "alignment_pairs",
        alignment(joint_vectors(view, task.test)[rows], finite(view.encode_text(texts), view)),
        n=len(rows),
        split=task.test.name,
        feature_point=f"{view.feature_point}, projected",
        preprocess=view.preprocess.hash(),
        data=content_hash((extracted.digests[row], text) for row, text in zip(rows, texts, strict=True)),
    )


def _flipped(view: View, split: Split, extracted: Extracted, rows: list[int]) -> Tensor:
    """Return the features of the mirrored images at `rows` of `extracted`."""
    pixels = [view.preprocess(split.source.image(extracted.kept[row])) for row in rows]
    return finite(view.features(torch.stack(pixels).flip(-1)), view)


def _spread(n: int, most: int) -> list[int]:
    """Return up to `most` indices that are spread evenly over 0 ... n - 1."""
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]
