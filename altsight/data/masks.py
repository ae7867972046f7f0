"""Masks over the patch grid: BEiT's blocks and SimMIM's square units. Each is a function of a key, made in the worker.

True marks a patch that is masked. Sources: Bao et al. 2022 (specification B2), Xie et al. 2022 (specification B3).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from altsight.core.rng import Key

ATTEMPTS = 10
"""Draws of a block before the generator gives up."""


def of_196(count: float, grid: tuple[int, int]) -> int:
    """Return a number of patches that a paper states for 14 x 14 of them, scaled to `grid` (at least 1)."""
    return max(1, round(count * grid[0] * grid[1] / 196))


def block_mask(
    grid: tuple[int, int],
    count: int,
    at: Key,
    least: int | None = None,
    most: int | None = None,
    aspect: float = 0.3,
    exact: bool = False,
) -> Tensor:
    """Return a mask (L,) bool of rectangular blocks, patches row by row: BEiT's generator.

    Blocks are added until `count` patches are masked, or none of ten draws fits any more. A block's area is uniform
    between `least` and what is still to be masked, its aspect ratio (height : width) log-uniform between `aspect` and
    1 / `aspect`; it is narrower and lower than the grid, masks something new, and no more than is still to be masked
    or than `most`. So the result has `count` masked patches or fewer.

    Args:
        grid: (rows, columns).
        count: wanted number of masked patches, 0 ... L.
        at: what to draw from; two masks of one image need two keys.
        least: smallest area that is drawn; None: 16 of 196 patches, scaled to the grid (BEiT).
        most: largest area that is drawn, and most that a block masks; None: no bound but `count`.
        aspect: smallest aspect ratio.
        exact: mask further patches, uniformly drawn, until there are exactly `count`. With it the number is the same
            for every image, without it the loss must take any number.
    """
    random = at.child("mask").generator()
    mask = np.zeros(grid, dtype=bool)
    least = of_196(16, grid) if least is None else least
    while (left := count - int(mask.sum())) > 0:
        if not _add_block(mask, least, min(left, most or left), aspect, random):
            break
    flat = mask.reshape(-1)
    if exact and left > 0:
        flat[random.permutation(np.flatnonzero(~flat))[:left]] = True
    return torch.from_numpy(flat)


def _add_block(mask: npt.NDArray[np.bool_], least: int, most: int, aspect: float, random: np.random.Generator) -> bool:
    """Add one block to `mask` in place; False where no draw fits."""
    rows, columns = mask.shape
    for size, slant, down, right in random.random((ATTEMPTS, 4)).tolist():
        area = least + size * (most - least)
        ratio = aspect ** (1 - 2 * slant)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < h < rows and 0 < w < columns):
            continue
        top, start = int(down * (rows - h + 1)), int(right * (columns - w + 1))
        block = mask[top : top + h, start : start + w]
        if 0 < block.size - int(block.sum()) <= most:
            block[:] = True
            return True
    return False


def unit_mask(grid: tuple[int, int], unit: int, ratio: float, at: Key) -> Tensor:
    """Return a mask (L,) bool of ceil(ratio * units) square units of `unit` x `unit` patches: SimMIM's.

    `unit` must divide the grid.
    """
    rows, columns = grid[0] // unit, grid[1] // unit
    units = np.zeros(rows * columns, dtype=bool)
    chosen = at.child("mask").generator().permutation(units.size)[: masked_units(grid, unit, ratio)]
    units[chosen] = True
    mask = units.reshape(rows, columns).repeat(unit, axis=0).repeat(unit, axis=1)
    return torch.from_numpy(mask.reshape(-1).copy())


def masked_units(grid: tuple[int, int], unit: int, ratio: float) -> int:
    """Return how many units `unit_mask` masks."""
    # 0.6 * 50 is 30.000000000000004 in binary; its ceiling is to be 30.
    return math.ceil(round((grid[0] // unit) * (grid[1] // unit) * ratio, 9))
