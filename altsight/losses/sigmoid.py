"""SigLIP's sigmoid loss: every image and every text of the global batch are a match or not, each pair on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from altsight.core.dist import gather, world


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return this rank's share of SigLIP's loss; the shares of all ranks sum to the loss (0-d, fp32).

    -1/N sum_ij log sigmoid(z_ij (scale * cosine_ij + bias)), z_ij = 1 for the N matched pairs and -1 for all others
    (Zhai et al. 2023; specification A5). A rank compares its images with the texts of one rank at a time, and the
    logits are computed anew in the backward pass: only n x n of them exist at once.

    Args:
        image, text: (n, E) un-normalised features of this rank's pairs; every rank holds the same n.
        scale: 0-d, the inverse temperature.
        bias: 0-d.
    """
    # Cosines and log-sigmoid need fp32 even where the towers run in bf16.
    with torch.autocast(image.device.type, enabled=False):
        image = F.normalize(image.float(), dim=-1)
        texts = gather(F.normalize(text.float(), dim=-1))
        total = torch.zeros((), device=image.device)
        for rank, part in enumerate(texts.split(len(image))):
            matched = rank == world().rank
            # Nothing here is random, so no state of generators has to be kept for the second computation.
            share = checkpoint(
                _sum_of_pairs, image, part, scale, bias, matched, use_reentrant=False, preserve_rng_state=False
            )
            total = total + share
        return total / len(texts)


def _sum_of_pairs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, matched: bool) -> Tensor:
    """Return -log sigmoid summed over all pairs of unit rows (n, E) and (n, E); `matched`: equal rows belong together.

    The sign goes in before the logarithm: -log sigmoid(x) as softplus(x) - x would lose the digits of a good match.
    """
    logits = scale.float() * image @ text.T + bias.float()
    if matched:
        sign = 2 * torch.eye(len(image), device=image.device) - 1
        return -F.logsigmoid(sign * logits).sum()
    return -F.logsigmoid(-logits).sum()
