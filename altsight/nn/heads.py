"""Projection heads of joint-embedding methods. Those with batch norm belong in `Method.loss`: they communicate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.dist import gather
from altsight.nn.init import fill, truncated


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows of all ranks, in fp32; heads are thrown away, so no running statistics are kept.

    Equal numbers of rows on every rank. The statistics go through the one gather with a gradient, so that any number
    of ranks computes what one does (torch's SyncBatchNorm does the same, on GPUs only).
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None

    def reset_parameters(self) -> None:
        """Set scale 1 and shift 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (n, D) with mean 0 and variance 1 per column over all ranks, times scale plus shift, fp32."""
        x = x.float()
        mean = gather(x.mean(dim=0, keepdim=True)).mean(dim=0)
        # In two passes: the square of the mean may be far larger than the variance.
        variance = gather((x - mean).square().mean(dim=0, keepdim=True)).mean(dim=0)
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class MLPHead(nn.Module):
    """Linear maps of `sizes` (input, hidden ..., output), batch norm and ReLU after every hidden one.

    last_norm: what follows the last map: nothing, batch norm, or batch norm without scale and shift.
    hidden_norm: batch norm after the hidden maps. A map that batch norm follows has no bias, since it would undo it.
    last_bias: whether the last map has one, where no batch norm follows it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        last_norm: Literal["none", "affine", "plain"] = "none",
        hidden_norm: bool = True,
        last_bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes[:-1]):
            layers.append(nn.Linear(width_in, width_out, bias=not hidden_norm))
            if hidden_norm:
                layers.append(GlobalBatchNorm(width_out))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias and last_norm == "none"))
        if last_norm != "none":
            layers.append(GlobalBatchNorm(sizes[-1], affine=last_norm == "affine"))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, output) fp32 from x (n, input)."""
        return self.layers(x.float())


class PrototypeHead(nn.Module):
    """DINO's head: an MLP with GELU to a unit vector, then its products with weight-normalised prototypes.

    Caron et al. 2021 (specification B8). `forward` is local; `logits` belongs to the loss.

    trained_norm: learn the length of the prototypes too (they stay at 1 otherwise).
    """

    def __init__(
        self, width: int, hidden: int, bottleneck: int, prototypes: int, layers: int = 3, trained_norm: bool = False
    ) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        maps: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            maps += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*maps[:-1])
        self.direction = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.length = nn.Parameter(torch.empty(prototypes, 1), requires_grad=trained_norm)

    def reset_parameters(self) -> None:
        """Set maps to N(0, 0.02) without bias, prototypes to random directions of length 1."""
        fill(self.mlp, truncated)
        truncated(self.direction)
        nn.init.ones_(self.length)

    def forward(self, x: Tensor) -> Tensor:
        """Return unit vectors (n, bottleneck) fp32 from features x (n, width)."""
        # The norm in fp32: in bf16 a unit vector is one only to a few per mille.
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, z: Tensor, frozen: bool = False) -> Tensor:
        """Return the products (n, prototypes) of z (n, bottleneck) with the prototypes, fp32.

        frozen: the prototypes get a gradient of zero, so that they stay where they are for this step and are still
        seen by all ranks (DINO cancels the gradient of its last layer in the first epoch).
        """
        weight = self.length * F.normalize(self.direction.float(), dim=-1)
        return F.linear(z, weight.detach() + 0 * weight if frozen else weight)
