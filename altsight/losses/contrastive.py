"""The symmetric image-text contrastive loss over the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather, world


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return this rank's share of CLIP's loss; the shares of all ranks sum to the loss (0-d, fp32).

    1/2 [CE(rows) + CE(columns)] of scale * cosine over all pairs (Radford et al. 2021; specification A1). Each rank
    computes its own rows and columns against everyone's features, with labels offset by rank * n: exact in value and
    gradient, and linear in the global batch in memory (specification 0.3, variant 2).

    Args:
        image, text: (n, E) un-normalised features of this rank's pairs; every rank holds the same n.
        scale: 0-d, the inverse temperature.
    """
    # Cosines and softmax need fp32 even where the towers run in bf16.
    with torch.autocast(image.device.type, enabled=False):
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(text.float(), dim=-1)
        images, texts = gather(image), gather(text)
        labels = torch.arange(len(image), device=image.device) + world().rank * len(image)
        rows = F.cross_entropy(scale.float() * image @ texts.T, labels, reduction="sum")
        columns = F.cross_entropy(scale.float() * text @ images.T, labels, reduction="sum")
        return (rows + columns) / (2 * len(images))
