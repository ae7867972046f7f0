"""KoLeo: keep every feature away from its nearest neighbour (Sablayrolles et al. 2019; specification B10, 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather, world

EPS = 1e-8


def koleo(features: Tensor) -> Tensor:
    """Return this rank's share of -mean log(distance to the nearest other feature); the shares sum to it (0-d, fp32).

    The neighbours are sought on the unit sphere among the rows of all ranks, by the largest product. Finite for equal
    features, by DINOv2's 1e-8 in each difference and in the logarithm.

    Args:
        features: (n, D) one row a sample, of any length; every rank holds the same n.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        everyone = gather(unit)
        with torch.no_grad():
            similarity = unit @ everyone.T
            similarity[:, world().rank * len(unit) :].fill_diagonal_(-torch.inf)
            nearest = similarity.argmax(dim=1)
        distance = F.pairwise_distance(unit, everyone[nearest], eps=EPS)
        return -(distance + EPS).log().sum() / len(everyone)
