"""Losses between two views of the same images: SimCLR's, MoCo v3's, BYOL's and SimSiam's.

All are taken over the global batch and return this rank's share; the shares of all ranks sum to the loss (0-d, fp32).
Every rank holds the same number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather, world


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the share of SimCLR's loss (Chen et al. 2020; specification B5).

    The cross-entropy of finding, by cosine / temperature, an image's other view among all 2N - 1 views but itself:
    the mean over the first views plus that over the second ones. It is their *sum*; SLIP takes their average.

    Args:
        first, second: (n, E) un-normalised projections of the views of this rank's images.
    """
    n, total = len(first), len(first) * world().size
    # Cosines and softmax need fp32 even where the towers run in bf16.
    with torch.autocast(first.device.type, enabled=False):
        views = [F.normalize(view.float(), dim=-1) for view in (first, second)]
        everyone = torch.cat([gather(view) for view in views])
        rows = torch.arange(n, device=first.device) + world().rank * n
        own, other = torch.cat([rows, rows + total]), torch.cat([rows + total, rows])
        logits = torch.cat(views) @ everyone.T / temperature
        logits = logits.scatter(1, own.unsqueeze(1), -torch.inf)
        return F.cross_entropy(logits, other, reduction="sum") / total


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return the share of MoCo v3's loss in one direction (Chen et al. 2021; specification B4).

    2 * temperature times the mean cross-entropy of finding the key of the same image among those of the global batch.
    Keys are taken as they are: no gradient reaches them.

    Args:
        queries, keys: (n, E) un-normalised, of different views of this rank's images.
    """
    n = len(queries)
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=-1)
        everyone = gather(F.normalize(keys.detach().float(), dim=-1))
        labels = torch.arange(n, device=queries.device) + world().rank * n
        loss = F.cross_entropy(queries @ everyone.T / temperature, labels, reduction="sum")
        return 2 * temperature * loss / len(everyone)


def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the share of BYOL's loss in one order: 2 - 2 cosine (Grill et al. 2020; specification B6).

    Args:
        predictions: (n, E). targets: (n, E); no gradient reaches them.
    """
    return (2 - 2 * _cosines(predictions, targets)).sum() / (len(predictions) * world().size)


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the share of SimSiam's loss in one order: -cosine (Chen and He 2021; specification B7).

    Args:
        predictions: (n, E). targets: (n, E); no gradient reaches them.
    """
    return -_cosines(predictions, targets).sum() / (len(predictions) * world().size)


def _cosines(predictions: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp32; the targets are constants."""
    with torch.autocast(predictions.device.type, enabled=False):
        predictions = F.normalize(predictions.float(), dim=-1)
        return (predictions * F.normalize(targets.detach().float(), dim=-1)).sum(dim=-1)
