"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018; specification D4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.evals.base import Result, Task, View
from altsight.evals.bootstrap import scored
from altsight.evals.features import classes_of, content_hash, join_notes, labelled, rate_of_commonest

K = 20
TEMPERATURE = 0.07
BLOCK_ELEMENTS = 2**24
"""Similarities held at a time."""


def knn(view: View, task: Task) -> Iterator[Result]:
    """Yield the top-1 accuracy on the test split, with the train split as the gallery."""
    if not task.label or task.multi_label or not len(task.train) or not len(task.test):
        return
    gallery, test = labelled(view, task, task.train), labelled(view, task, task.test)
    classes = len(classes_of(task))
    votes = knn_votes(test.vectors, gallery.vectors, gallery.labels, classes, device=view.device)
    yield scored(
        view,
        votes.argmax(dim=1) == test.labels,
        task=task.name,
        evaluator="knn",
        metric="top1",
        chance=1 / classes,
        split=task.test.name,
        feature_point=view.feature_point,
        data=content_hash([gallery.data, test.data]),
        note=join_notes(gallery.note, test.note),
        extra={"k": K, "classes": classes, "commonest": rate_of_commonest(gallery.labels, test.labels)},
    )


def knn_votes(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the votes (n, classes): the sum of exp(cosine / temperature) over the neighbours of each class.

    Args:
        queries: features (n, D). gallery: features (m, D); a gallery smaller than `k` votes as a whole.
        labels: class ids (m,) of the gallery.
    """
    gallery = F.normalize(gallery.float(), dim=1).to(device)
    labels = labels.to(device)
    votes = []
    for block in F.normalize(queries.float(), dim=1).split(max(1, BLOCK_ELEMENTS // len(gallery))):
        similarity, nearest = (block.to(device) @ gallery.T).topk(min(k, len(gallery)), dim=1)
        zeros = torch.zeros(len(block), classes, device=device)
        votes.append(zeros.scatter_add_(1, labels[nearest], (similarity / temperature).exp()).cpu())
    return torch.cat(votes)
