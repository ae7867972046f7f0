"""Losses of masked unsupervised self-training (Li et al. 2022, "Masked Unsupervised Self-training"; specification 5.1).

All of them are computed in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather

UNSURE = -100
"""Pseudo-label of an image that the teacher is not confident about; cross-entropy ignores it."""


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Return the likeliest class (B,) of every row of the teacher's logits (B, C), `UNSURE` up to a probability."""
    confidence, label = logits.float().softmax(dim=-1).max(dim=-1)
    return torch.where(confidence > threshold, label, UNSURE)


def pseudo_ce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the student's logits (B, C), summed over the labels that are not `UNSURE` (0-d)."""
    return F.cross_entropy(logits.float(), labels, ignore_index=UNSURE, reduction="sum")


def log_mean_prediction(logits: Tensor) -> Tensor:
    """Return the logarithm of the mean prediction over all ranks' rows, with its gradient: (C,).

    In logarithms: the probability of a class that no image is near to is 0 in fp32 at a scale of 100.
    """
    rows = gather(logits.float().log_softmax(dim=-1))
    return rows.logsumexp(dim=0) - math.log(len(rows))


def fairness(log_mean: Tensor) -> Tensor:
    """Return -1/C sum over classes of the log mean prediction (C,): least, log C, where all are used evenly (0-d)."""
    return -log_mean.mean()


def masked_alignment_sum(patches: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return |z_patch - z_image|^2 of unit vectors, summed over the masked patches (0-d).

    Args:
        patches: (B, L, E) vectors of the patches in the joint space. image: (B, E) those of the images.
        mask: (B, L) bool.
    """
    local, whole = F.normalize(patches.float(), dim=-1), F.normalize(image.float(), dim=-1)
    return ((local - whole.unsqueeze(1)).square().sum(dim=-1) * mask).sum()
