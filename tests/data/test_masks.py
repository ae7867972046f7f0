"""Block-wise and square masks: their numbers, their shapes, and that they are functions of a key."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch import Tensor

from altsight.core.rng import key
from altsight.data.masks import block_mask, masked_units, of_196, unit_mask

GRID = (14, 14)


def blocks(count: int, draws: int = 300, **options: float) -> list[Tensor]:
    return [block_mask(GRID, count, key(0, i), **options) for i in range(draws)]  # type: ignore[arg-type]


def test_a_mask_is_a_function_of_its_key() -> None:
    first = block_mask(GRID, 75, key(0, 1))
    assert first.dtype == torch.bool and first.shape == (196,)
    assert torch.equal(first, block_mask(GRID, 75, key(0, 1)))
    for other in (key(0, 2), key(1, 1), key(0, 1).child("other view")):
        assert not torch.equal(first, block_mask(GRID, 75, other))


def test_beits_count_is_75_or_somewhat_less() -> None:
    """The generator stops where no block fits; most masks are full (specification B2)."""
    counts = collections.Counter(int(mask.sum()) for mask in blocks(75))
    assert max(counts) == 75 and min(counts) >= 50
    assert 0.4 < counts[75] / 300 < 1, "some fall short, or the loss would never see a variable number"


def test_exact_masks_have_one_count_and_hold_the_inexact_ones() -> None:
    for i, inexact in enumerate(blocks(75, 100)):
        exact = block_mask(GRID, 75, key(0, i), exact=True)
        assert int(exact.sum()) == 75
        assert (exact | inexact).equal(exact)
    for grid, count in (((3, 5), 7), ((1, 2), 1), ((1, 1), 1), ((2, 2), 4), (GRID, 0)):
        assert int(block_mask(grid, count, key(0, 0), exact=True).sum()) == count


def is_block(mask: Tensor) -> tuple[int, int] | None:
    """Return (height, width) of the one rectangle that the mask is; None if it is none."""
    rows, columns = mask.view(GRID).any(1).nonzero().flatten(), mask.view(GRID).any(0).nonzero().flatten()
    h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    return (h, w) if int(mask.sum()) == h * w else None


def test_single_blocks_have_the_areas_and_shapes_that_were_asked_for() -> None:
    """With a count that one block can reach, the first block is often all there is, and can be measured."""
    sizes = [size for mask in blocks(20, 600, least=18, most=20) if (size := is_block(mask))]
    assert len(sizes) > 60
    assert all(14 <= h * w <= 20 for h, w in sizes)  # 18 to 20 before the sides are rounded, never above the count
    ratios = np.array([h / w for h, w in sizes])
    assert 0.2 < ratios.min() < 0.45 and 1 / 0.45 < ratios.max() < 1 / 0.2  # 0.3 and 1 / 0.3 before rounding
    assert abs(float(np.log(ratios).mean())) < 0.2, "tall and wide are equally likely"
    squares = [size for mask in blocks(20, 600, least=18, most=20, aspect=0.99) if (size := is_block(mask))]
    assert {h - w for h, w in squares} <= {-1, 0, 1}


def test_a_block_masks_no_more_than_the_most_that_is_asked_for() -> None:
    """Rounding its sides makes some blocks larger than the area that was drawn: these are drawn again.

    Rectangles of 21 or 22 are then those that two blocks happen to make, a few in a hundred; they would be half.
    """
    masked = [int(mask.sum()) for mask in blocks(22, 600, least=18, most=20) if is_block(mask)]
    assert sum(count > 20 for count in masked) < 0.1 * len(masked)


def test_a_mask_is_in_few_pieces() -> None:
    """Neighbours of masked patches are masked far more often than under a uniform mask (which has 75 / 196)."""
    shares = []
    for mask in blocks(75, 100):
        grid = mask.view(GRID)
        both = (grid[:, 1:] & grid[:, :-1]).sum()
        shares.append(float(both / grid[:, :-1].sum()))
    assert np.mean(shares) > 0.75


def test_blocks_lie_everywhere() -> None:
    """Every patch is masked sometimes; the corners least."""
    share = torch.stack(blocks(75, 600)).float().mean(0).view(GRID)
    assert share.min() > 0.02 and share.max() < 0.8
    assert abs(share[:7].mean() - share[7:].mean()) < 0.05 and abs(share[:, :7].mean() - share[:, 7:].mean()) < 0.05


def test_no_block_is_larger_than_asked() -> None:
    for mask in blocks(8, 100, least=2, most=2, aspect=0.5):
        assert int(mask.sum()) >= 7
    one = block_mask(GRID, 2, key(0, 0), least=2, most=2, aspect=0.5)
    assert is_block(one) in {(1, 2), (2, 1), (1, 1)}


def test_counts_scale_with_the_grid() -> None:
    assert [of_196(75, grid) for grid in (GRID, (16, 16), (4, 4), (1, 1))] == [75, 98, 6, 1]


@pytest.mark.parametrize(("grid", "unit", "count"), [(GRID, 2, 30), ((7, 7), 1, 30), ((4, 4), 2, 3), ((4, 8), 2, 5)])
def test_square_masks(grid: tuple[int, int], unit: int, count: int) -> None:
    """30 of 7 x 7 squares at 224 pixels (specification B3)."""
    assert masked_units(grid, unit, 0.6) == count
    seen = torch.zeros(grid)
    for i in range(50):
        mask = unit_mask(grid, unit, 0.6, key(0, i)).view(grid)
        whole = mask[::unit, ::unit]
        assert int(whole.sum()) == count
        assert torch.equal(mask, whole.repeat_interleave(unit, 0).repeat_interleave(unit, 1))
        seen += mask
    assert seen.min() > 0
    assert torch.equal(unit_mask(grid, unit, 0.6, key(0, 3)), unit_mask(grid, unit, 0.6, key(0, 3)))


def test_a_whole_number_of_squares_is_not_rounded_up() -> None:
    assert masked_units((10, 5), 1, 0.6) == 30
    assert 100 * 0.55 > 55, "what the next line is about: 0.55 is no binary fraction"
    assert masked_units((10, 10), 1, 0.55) == 55
