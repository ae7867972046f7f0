"""LCL's losses against loops over their formulas, on rows that ranks hold in different numbers."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from altsight.core import dist
from altsight.data.sequence import Markers
from altsight.losses.latent import context_loss, regression_sum, text_targets

SIZES = ((3, 2), (0, 4), (1, 0), (0, 0))
"""Rows of rank 0 and of rank 1."""


def random(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def slow(image: Tensor, context: Tensor, scale: float) -> float:
    """1/2 [CE over contexts for each image + CE over images for each context], averaged over rows."""
    u, v = (
        [[a / math.sqrt(sum(b * b for b in row)) for a in row] for row in x.double().tolist()] for x in (image, context)
    )
    total = 0.0
    for mine, other in ((u, v), (v, u)):
        for k, row in enumerate(mine):
            logits = [scale * sum(a * b for a, b in zip(row, column, strict=True)) for column in other]
            total += math.log(sum(math.exp(x) for x in logits)) - logits[k]
    return total / (2 * len(u))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_reference(scale: float) -> None:
    image, context = random(5, 6), random(5, 6, seed=1)
    loss = context_loss(image, context, torch.tensor(scale))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(image, context, scale), rel=1e-5)


def test_one_row_is_told_from_no_other() -> None:
    assert context_loss(random(1, 6), random(1, 6, seed=1), torch.tensor(14.3)).item() == pytest.approx(0, abs=1e-6)


def test_no_row_gives_no_loss_and_a_gradient_of_zero() -> None:
    inputs = [torch.zeros(0, 6, requires_grad=True), torch.zeros(0, 6, requires_grad=True)]
    scale = torch.tensor(14.3, requires_grad=True)
    loss = context_loss(*inputs, scale)
    assert loss.item() == 0
    assert [grad.tolist() for grad in torch.autograd.grad(loss, [*inputs, scale])] == [[], [], 0.0]


def test_is_computed_in_fp32_under_autocast() -> None:
    image, context, scale = random(6, 8), random(6, 8, seed=1), torch.tensor(100.0)
    expected = context_loss(image, context, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(context_loss(image, context, scale), expected)


def _rank(rank: int, store: str, results: SimpleQueue[Any]) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = []
    for sizes in SIZES:
        mine = slice(rank * sizes[0], sizes[0] + rank * sizes[1])
        rows = [random(sum(sizes), 6, seed)[mine].requires_grad_() for seed in (0, 1)]
        scale = torch.tensor(14.3, requires_grad=True)
        loss = context_loss(*rows, scale)
        gradients = torch.autograd.grad(loss, [*rows, scale])
        found.append((loss.item(), [gradient.tolist() for gradient in gradients]))
    results.put((rank, found))
    dist.barrier()
    dist.stop()


def test_two_ranks_with_different_numbers_of_rows_share_one_loss(tmp_path: Any) -> None:
    """The shares add up to the loss over all rows, their gradients to its gradient; no rank waits for another."""
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    (_, first), (_, second) = sorted(results.get() for _ in range(2))
    for sizes, (loss0, grads0), (loss1, grads1) in zip(SIZES, first, second, strict=True):
        rows = [random(sum(sizes), 6, seed).requires_grad_() for seed in (0, 1)]
        scale = torch.tensor(14.3, requires_grad=True)
        whole = context_loss(*rows, scale)
        assert loss0 + loss1 == pytest.approx(slow(*rows, 14.3) if sum(sizes) else 0.0, rel=1e-5)
        expected = torch.autograd.grad(whole, [*rows, scale])
        for number in (0, 1):
            ours = torch.tensor([*grads0[number], *grads1[number]]).view_as(expected[number])
            torch.testing.assert_close(ours, expected[number], rtol=1e-4, atol=1e-6)
        assert grads0[2] + grads1[2] == pytest.approx(expected[2].item(), rel=1e-4, abs=1e-6)


MARKERS = Markers(start_of_image=50, end_of_image=51, image=52)


def test_targets_are_text_ends_and_starts_of_pictures() -> None:
    picture = [50, 52, 52, 51]
    rows = [[1, 7, *picture, 0, *picture, 2], [*picture, 8, 2, 0, 0], [1, 9, *picture, 0, 2, 52]]
    lengths = [12, 6, 6]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = text_targets(ids, torch.tensor(lengths), MARKERS)
    assert targets.shape == (3, width - 1)
    for row, length, found in zip(rows, lengths, targets, strict=True):
        # The id of the padding, 0, is a target where it is text; what lies behind the length is none, whatever it is.
        expected = [after not in (51, 52) and place < length for place, (_, after) in enumerate(pairwise(row), start=1)]
        assert found.tolist() == expected + [False] * (width - 1 - len(expected))
    kept = [ids[row, 1:][targets[row]].tolist() for row in range(3)]
    assert kept == [[7, 50, 0, 50, 2], [8, 2], [9, 50]]


def test_regression_is_the_mean_over_dimensions_summed_over_rows_and_pulls_on_both() -> None:
    predicted, latent = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    total = sum((p - t) ** 2 / 3 for p, t in zip(predicted.flatten().tolist(), latent.flatten().tolist(), strict=True))
    loss = regression_sum(predicted, latent)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    mine, other = torch.autograd.grad(loss, [predicted, latent])
    assert torch.equal(mine, -other) and bool(mine.abs().sum() > 0)
