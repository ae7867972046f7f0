"""Scores of tiles (N, C) -> scores of the whole picture (C,): top-K or mean, after smoothing over neighbours or not.

MI-Zero (Lu et al. 2023; specification 1.2). What is pooled are cosines: a softmax over a tile's classes would change
the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor


def top_k(scores: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """Return for every K >= 1 the mean (C,) of each class's K largest scores (N, C), or of all N where K is more.

    Every class has its own K tiles. One sort serves all K.
    """
    best = scores.topk(min(max(ks), len(scores)), dim=0).values.cumsum(dim=0)
    return {k: best[min(k, len(scores)) - 1] / min(k, len(scores)) for k in ks}


def neighbours(coords: npt.ArrayLike, k: int, include_self: bool = True) -> Tensor:
    """Return for each tile the rows of its `k` nearest by coordinates (N, k), fewer where there are no more tiles.

    include_self: a tile is its own first neighbour, as a plain search for neighbours finds it; the source leaves it
    open. Which of several equally near ones are taken depends on where they lie, not on their order.
    """
    places = np.asarray(coords, dtype=np.float64)
    if len(places) == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    order = np.lexsort(places.T[::-1])
    search = NearestNeighbors(n_neighbors=min(k, len(places) - (not include_self)), algorithm="kd_tree")
    search.fit(places[order])
    found = search.kneighbors(places[order] if include_self else None, return_distance=False)
    index = np.empty_like(found)
    index[order] = order[found]
    return torch.from_numpy(index.astype(np.int64))


def smooth(scores: Tensor, index: Tensor) -> Tensor:
    """Return scores (N, C), each the mean over the tiles that `index` (N, k) names."""
    return scores[index].mean(dim=1)


def pooled(scores: Tensor, index: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Return the scores (C,) of a picture by every way of pooling: "top5", "mean", "smooth top5", "smooth mean" ..."""
    found: dict[str, Tensor] = {}
    for prefix, field in (("", scores), ("smooth ", smooth(scores, index))):
        found |= {f"{prefix}top{k}": value for k, value in top_k(field, ks).items()}
        found[f"{prefix}mean"] = field.mean(dim=0)
    return found
