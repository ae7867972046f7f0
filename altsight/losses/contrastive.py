"""The symmetric image-text contrastive loss over the global batch: CLIP's mean and ALIGN's sum of two directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather, world


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return this rank's share of CLIP's loss; the shares of all ranks sum to the loss (0-d, fp32).

    1/2 [CE(rows) + CE(columns)] of scale * cosine over all pairs (Radford et al. 2021; specification A1).

    Args:
        image, text: (n, E) un-normalised features of this rank's pairs; every rank holds the same n.
        scale: 0-d, the inverse temperature.
    """
    return _both_directions(image, text, scale) / 2


def align_loss(image: Tensor, text: Tensor, temperature: Tensor, smoothing: float) -> Tensor:
    """Return this rank's share of ALIGN's loss; the shares of all ranks sum to the loss (0-d, fp32).

    CE(rows) + CE(columns), not their mean, of cosine / temperature over all pairs (Jia et al. 2021; specification A2).
    A share `smoothing` of every target is spread evenly over the global batch, the match included.

    Args:
        image, text: (n, E) un-normalised features of this rank's pairs; every rank holds the same n.
        temperature: 0-d, what the cosines are divided by.
        smoothing: in [0, 1).
    """
    return _both_directions(image, text, 1 / temperature, smoothing)


def _both_directions(image: Tensor, text: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return this rank's share of CE(rows) + CE(columns).

    Each rank computes its own rows and columns against everyone's features, with labels offset by rank * n: exact in
    value and gradient, and linear in the global batch in memory (specification 0.3, variant 2).
    """
    # Cosines and softmax need fp32 even where the towers run in bf16.
    with torch.autocast(image.device.type, enabled=False):
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(text.float(), dim=-1)
        images, texts = gather(image), gather(text)
        labels = torch.arange(len(image), device=image.device) + world().rank * len(image)
        rows = _ce_sum(scale.float() * image @ texts.T, labels, smoothing)
        columns = _ce_sum(scale.float() * text @ images.T, labels, smoothing)
        return (rows + columns) / len(images)


def _ce_sum(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
