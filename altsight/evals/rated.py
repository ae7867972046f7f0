"""Retrieval with the extra positives that people found, and correlation with their ratings (CxC; specification D2).

Crisscrossed Captions rate pairs of COCO's images and captions from 0 to 5, across images and within one kind. A pair
from `POSITIVE` on is right in retrieval, beside every image with its own captions; images and captions are then also
searched with one another. The correlation is Spearman's, over samples of the queries.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.base import Rating, Result, Task, View, not_applicable
from altsight.evals.bootstrap import LEVEL, scored
from altsight.evals.features import captions_of, content_hash, extract, finite, join_notes, joint_vectors, left_out
from altsight.evals.retrieval import TOP, ranks

POSITIVE = 3.0
SAMPLES = 1000
"""Draws of half the queries, with one rated partner each, of which the correlation is the mean."""
KINDS = ("image", "caption")
WAYS = (("image", "caption"), ("caption", "image"), ("image", "image"), ("caption", "caption"))
BLOCK_ELEMENTS = 2**24

Item = tuple[str, str]
"""Kind and id."""


@dataclass(frozen=True)
class Items:
    """The images and captions of a split, kind by kind: unit vectors, ids, and the image of every row."""

    vectors: dict[str, Tensor]
    ids: dict[str, dict[str, int]]
    owners: dict[str, Tensor]


def rated(view: View, task: Task) -> Iterator[Result]:
    """Yield R@1, 5, 10 between and within images and captions, and the rank correlations with the ratings.

    A query without a right answer other than itself is left out, and nothing finds itself. Without a text tower, only
    images are compared, by their features.
    """
    if not task.ratings:
        return
    items, fields = _items(view, task)
    pairs = _known(task.ratings, items)
    if not pairs:
        raise UserError(
            f"no rating of the task '{task.name}' names two things of its test split: check image_id and caption_ids."
        )
    lost = len(task.ratings) - len(pairs)
    fields["note"] = join_notes(fields["note"], f"{lost:,} ratings name what is not there" if lost else "")
    for way in WAYS:
        yield from _found(view, task, way, items, pairs, fields)
    for way in WAYS[1:]:
        yield from _correlation(view, task, way, items, pairs, fields)


def read_ratings(paths: Sequence[str]) -> tuple[Rating, ...]:
    """Return the ratings of CSV files: two columns image... or caption..., and their agg_score.

    Ids such as `COCO_val2014:sentid:732091` are cut to the number at their end.

    Raises:
        UserError: a file is missing or has other columns.
    """
    found = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"the ratings '{path}' cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            raise UserError(f"the ratings '{path}' are no UTF-8 text: save them as UTF-8.") from None
        columns = list(rows[0])[:2] if rows else []
        kinds = [re.sub(r"\d+$", "", column) for column in columns]
        if len(kinds) < 2 or any(kind not in KINDS for kind in kinds) or "agg_score" not in rows[0]:
            raise UserError(
                f"the ratings '{path}' must begin with two columns image or caption, and have an agg_score."
            )
        for line, row in enumerate(rows, start=2):
            first, second = ((kind, row[c].rpartition(":sentid:")[2]) for kind, c in zip(kinds, columns, strict=True))
            try:
                found.append(Rating(first, second, float(row["agg_score"])))
            except (TypeError, ValueError):
                raise UserError(f"line {line} of '{path}' has no number as its agg_score: mend it.") from None
    return tuple(found)


def best_ranks(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]], itself: Sequence[int]) -> Tensor:
    """Return the rank (n,) of the best-ranked right answer of each query; 0 is first.

    Args:
        queries: unit vectors (n, E). gallery: unit vectors (m, E). right: rows of the gallery that are right for each
            query. itself: the row that is the query itself and never found; -1 where it is none.
    """
    found = []
    step = max(1, BLOCK_ELEMENTS // len(gallery))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.T
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row in range(len(scores)):
            allowed[row, list(right[start + row])] = True
            if itself[start + row] >= 0:
                scores[row, itself[start + row]] = -torch.inf
        found.append(ranks(scores, scores.masked_fill(~allowed, -torch.inf).argmax(dim=1)))
    return torch.cat(found)


def _items(view: View, task: Task) -> tuple[Items, dict[str, Any]]:
    """Return what there is to compare, and the fields that all results share."""
    extracted, texts = extract(view, task.test), captions_of(task.test)
    rows = [row for row, sample in enumerate(extracted.kept) if texts[sample]]
    samples = [extracted.kept[row] for row in rows]
    images = joint_vectors(view, task.test) if view.is_dual else F.normalize(extracted.vectors, dim=1)
    fields = [task.test.source.fields(sample) for sample in samples]
    ids = {"image": {str(f.get(task.image_id)): i for i, f in enumerate(fields)}, "caption": dict[str, int]()}
    flat: list[str] = []
    owners: list[int] = []
    unnamed = 0
    for image, (sample, values) in enumerate(zip(samples, fields, strict=True)):
        names = values.get(task.caption_ids, []) if task.caption_ids else texts[sample]
        names = names if isinstance(names, list) else [names]
        if len(names) == len(texts[sample]):
            ids["caption"] |= {str(name): len(flat) + i for i, name in enumerate(names)}
        else:  # two captions of the image are equal and count once, or it has no ids
            unnamed += 1
        flat += texts[sample]
        owners += [image] * len(texts[sample])
    captions = [task.caption_prompt.replace("{}", text) for text in flat]
    vectors = {"image": images[rows]}
    if view.is_dual:
        vectors["caption"] = finite(view.encode_text(captions), view)
    note = join_notes(
        left_out(task.test, {"a broken image": extracted.broken, "no caption": len(extracted.kept) - len(rows)}),
        f"the captions of {unnamed} images have not an id each" if unnamed else "",
    )
    ratings = [[*rating.first, *rating.second, rating.score] for rating in task.ratings]
    shared = {
        "task": task.name,
        "evaluator": "rated",
        "split": task.test.name,
        "feature_point": f"{view.feature_point}, projected" if view.is_dual else view.feature_point,
        "data": content_hash([[extracted.digests[row] for row in rows], flat, ratings]),
        "note": note,
        "extra": {"positive_from": POSITIVE, "caption_prompt": task.caption_prompt},
    }
    owned = {"image": torch.arange(len(rows)), "caption": torch.tensor(owners)}
    return Items(vectors, ids, owned), shared


Pair = tuple[str, int, str, int, float]
"""Kind and row of one thing, of another, and the rating of the two."""


def _known(ratings: Sequence[Rating], items: Items) -> list[Pair]:
    """Return the ratings whose two things are there."""
    found = []
    for rating in ratings:
        (kind_a, id_a), (kind_b, id_b) = rating.first, rating.second
        a, b = items.ids[kind_a].get(id_a), items.ids[kind_b].get(id_b)
        if a is not None and b is not None:
            found.append((kind_a, a, kind_b, b, rating.score))
    return found


def _found(
    view: View, task: Task, way: tuple[str, str], items: Items, pairs: Sequence[Pair], fields: dict[str, Any]
) -> Iterator[Result]:
    """Yield recall of one way; nothing where no query has a right answer."""
    query, answer = way
    name = f"{_name(query)}_to_{_name(answer)}"
    right: dict[int, set[int]] = defaultdict(set)
    if query != answer:
        for caption, image in enumerate(items.owners["caption"].tolist()):
            right[image if query == "image" else caption].add(caption if query == "image" else image)
    for kind_a, a, kind_b, b, score in pairs:
        for (kind, row), (other, partner) in pairwise(((kind_a, a), (kind_b, b), (kind_a, a))):
            if (kind, other) == way and score >= POSITIVE and (query != answer or row != partner):
                right[row].add(partner)
    queries = sorted(right)
    if not queries:
        return
    if not {query, answer} <= items.vectors.keys():
        for k in TOP:
            yield not_applicable(view, task, "rated", f"{name}_r{k}")
        return
    itself = queries if query == answer else [-1] * len(queries)
    vectors = items.vectors[query][queries]
    found = best_ranks(vectors, items.vectors[answer], [sorted(right[row]) for row in queries], itself)
    # Captions of one image are no independent test items.
    of_images = items.owners[query][queries].unique_consecutive(return_counts=True)[1]
    for k in TOP:
        yield scored(view, found < k, of_images if query == "caption" else None, metric=f"{name}_r{k}", **fields)


def _correlation(
    view: View, task: Task, way: tuple[str, str], items: Items, pairs: Sequence[Pair], fields: dict[str, Any]
) -> Iterator[Result]:
    """Yield the mean rank correlation over samples of half the queries, each with one of its rated partners."""
    partners: dict[int, list[tuple[float, float]]] = defaultdict(list)
    metric = f"spearman_{_name(way[0])}_{_name(way[1])}"
    mine = [pair for pair in pairs if sorted((pair[0], pair[2])) == sorted(way)]
    if len(mine) < 2:
        return
    if not set(way) <= items.vectors.keys():
        yield not_applicable(view, task, "rated", metric)
        return
    for kind_a, a, kind_b, b, score in mine:
        cosine = float(items.vectors[kind_a][a] @ items.vectors[kind_b][b])
        partners[a if kind_a == way[0] else b].append((cosine, score))
    queries = list(partners.values())
    draw = key(0, 0, "spearman").generator()
    values = []
    for _ in range(SAMPLES):
        chosen = draw.permutation(len(queries))[: max(2, len(queries) // 2)]
        sample = np.array([queries[i][int(draw.integers(len(queries[i])))] for i in chosen])
        of_cosine, of_rating = rankdata(sample[:, 0]), rankdata(sample[:, 1])
        if of_cosine.std() and of_rating.std():
            values.append(float(np.corrcoef(of_cosine, of_rating)[0, 1]))
    if values:
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        extra = {**fields["extra"], "seed": 0, "ratings": len(mine), "samples": SAMPLES}
        yield Result(
            metric=metric,
            value=float(np.mean(values)),
            low=float(low),
            high=float(high),
            chance=0.0,
            n=len(queries),
            preprocess=view.preprocess.hash(),
            **{**fields, "extra": extra},
        )


def _name(kind: str) -> str:
    return {"image": "image", "caption": "text"}[kind]
