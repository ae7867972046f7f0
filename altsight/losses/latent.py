"""LCL's losses: text after what precedes it, and pictures against the context that precedes them.

Yang et al. 2024, "Vision Model Pre-training on Interleaved Image-Text Data via Latent Compression Learning", arXiv
2406.07543 (specification LCL 2.5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import gather_rows
from altsight.data.sequence import Markers


def text_targets(ids: Tensor, lengths: Tensor, markers: Markers) -> Tensor:
    """Return which of the ids after the first are to be predicted: (B, T - 1) bool for `ids` (B, T).

    All that a sequence holds but the tokens of a picture and its end: its text, its end, and where pictures start.
    What lies behind its length (B,) is padding, whatever its id.
    """
    targets = ids[:, 1:]
    used = torch.arange(1, ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    return used & (targets != markers.image) & (targets != markers.end_of_image)


def context_loss(image: Tensor, context: Tensor, scale: Tensor) -> Tensor:
    """Return this rank's share of the contrastive loss; the shares of all ranks sum to the loss (0-d, fp32).

    1/2 [CE of an image over all contexts + CE of a context over all images] of scale * cosine, averaged over all the
    rows of all ranks. Ranks may hold different numbers of rows, or none; without any row at all the loss is 0.

    Args:
        image, context: (n, E) un-normalised vectors of this rank's pictures, and of what precedes each.
        scale: 0-d, the inverse temperature.
    """
    # Cosines and softmax need fp32 even where the models run in bf16.
    with torch.autocast(image.device.type, enabled=False):
        image = F.normalize(image.float(), dim=-1)
        context = F.normalize(context.float(), dim=-1)
        everyone, first = gather_rows(torch.cat([image, context], dim=-1))
        if not len(everyone):
            # Still a function of everything, so that every parameter gets a gradient.
            return 0 * (image.sum() + context.sum() + scale.float())
        images, contexts = everyone.chunk(2, dim=-1)
        labels = first + torch.arange(len(image), device=image.device)
        rows = F.cross_entropy(scale.float() * image @ contexts.T, labels, reduction="sum")
        columns = F.cross_entropy(scale.float() * context @ images.T, labels, reduction="sum")
        return (rows + columns) / (2 * len(everyone))


def regression_sum(predicted: Tensor, latent: Tensor) -> Tensor:
    """Return the squared error, averaged over dimensions and summed over the rows of two (n, D) (0-d, fp32).

    The gradient reaches the latents too, as in the objective that LCL is compared with: nothing stops them from
    becoming constant, which is what makes them easy to predict.
    """
    return (predicted.float() - latent.float()).square().mean(dim=-1).sum()
