"""SigLIP's loss against loops over the formula; as the sum of the shares of four processes; in little memory."""

from __future__ import annotations

import math
import os
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from altsight.core import dist
from altsight.core.dist import World
from altsight.losses import sigmoid
from altsight.losses.sigmoid import sigmoid_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGE, TEXT = random(8, 5), random(8, 5, seed=1)


def slow(image: Tensor, text: Tensor, scale: float, bias: float) -> float:
    """-1/N sum_ij log sigmoid(z_ij (scale cos_ij + bias)), pair by pair, in double precision."""
    total = 0.0
    for i, x in enumerate(image.tolist()):
        for j, y in enumerate(text.tolist()):
            cosine = sum(a * b for a, b in zip(x, y, strict=True))
            cosine /= math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
            z = 1 if i == j else -1
            total += math.log(1 + math.exp(-z * (scale * cosine + bias)))
    return total / len(image)


def matrix(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same from the whole matrix, in double precision, for its gradient."""
    x, y = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    signs = torch.full((len(x), len(x)), -1.0, dtype=torch.float64).fill_diagonal_(1)
    return (1 + (-signs * (scale * x @ y.T + bias)).exp()).log().sum() / len(x)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, -12.0)])
def test_equals_reference(scale: float, bias: float) -> None:
    loss = sigmoid_loss(IMAGE, TEXT, torch.tensor(scale), torch.tensor(bias))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(IMAGE, TEXT, scale, bias), rel=1e-5)


def test_gradient_equals_that_of_the_matrix() -> None:
    inputs = [IMAGE.clone(), TEXT.clone(), torch.tensor(7.0).double(), torch.tensor(-3.0).double()]
    for value in inputs:
        value.requires_grad_()
    expected = torch.autograd.grad(matrix(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(sigmoid_loss(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_loss_of_a_perfect_match_keeps_its_digits() -> None:
    """log sigmoid(x) for a large x is -exp(-x); as x - softplus(x) it would be 0 in fp32."""
    image = torch.eye(2)
    loss = sigmoid_loss(image, image, torch.tensor(60.0), torch.tensor(-30.0))
    assert loss.item() == pytest.approx(2 * math.exp(-30), rel=1e-4)


def test_loss_at_the_start_is_ten() -> None:
    """Specification E3.10: softplus(-10) (B - 1) + softplus(10), for features with cosines about 0."""
    image, text = random(8, 4096), random(8, 4096, seed=1)
    loss = sigmoid_loss(image, text, torch.tensor(10.0), torch.tensor(-10.0)).item()
    assert loss == pytest.approx(7 * math.log1p(math.exp(-10)) + math.log1p(math.exp(10)), rel=0.02)
    assert loss == pytest.approx(10, abs=0.2)


def test_is_computed_in_fp32_under_autocast() -> None:
    inputs = IMAGE.float(), TEXT.float(), torch.tensor(100.0), torch.tensor(-10.0)
    expected = sigmoid_loss(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sigmoid_loss(*inputs), expected)


def test_only_the_pairs_of_one_rank_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 of 4: four matrices of 2 x 2, one after the other, of which none is kept for the backward pass."""
    texts = torch.nn.functional.normalize(TEXT.float(), dim=-1)
    monkeypatch.setattr(sigmoid, "world", lambda: World(2, 4))
    monkeypatch.setattr(sigmoid, "gather", lambda x: texts)
    shapes: list[tuple[int, ...]] = []
    usual = torch.nn.functional.logsigmoid
    monkeypatch.setattr(sigmoid.F, "logsigmoid", lambda x: shapes.append(tuple(x.shape)) or usual(x))
    kept: list[tuple[int, ...]] = []
    image, scale = IMAGE[4:6].clone().requires_grad_(), torch.tensor(5.0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        loss = sigmoid_loss(image, TEXT[4:6], scale, torch.tensor(-4.0))
    assert shapes == [(2, 2)] * 4
    assert (2, 2) not in kept
    loss.backward()  # type: ignore[no-untyped-call]
    assert shapes == [(2, 2)] * 8 and image.grad is not None
    expected = sum(
        math.log(1 + math.exp((-1 if i == j else 1) * (5 * cosine(IMAGE[i], TEXT[j]) - 4))) / 8
        for i in (4, 5)
        for j in range(8)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def _rank(rank: int, store: str, results: SimpleQueue[Any]) -> None:
    os.environ |= {"WORLD_SIZE": "4", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    dist.start(torch.device("cpu"))
    mine = slice(2 * rank, 2 * rank + 2)
    inputs = [IMAGE[mine].clone(), TEXT[mine].clone(), torch.tensor(7.0), torch.tensor(-3.0)]
    for value in inputs:
        value.requires_grad_()
    loss = sigmoid_loss(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    results.put((rank, loss.item(), [grad.numpy() for grad in grads]))
    dist.barrier()
    dist.stop()


def test_shares_of_four_processes_sum_to_the_loss_with_its_gradient(tmp_path: Path) -> None:
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=4, start_method="fork")  # type: ignore[no-untyped-call]
    ranks = sorted((results.get() for _ in range(4)), key=lambda result: result[0])
    assert sum(loss for _, loss, _ in ranks) == pytest.approx(slow(IMAGE, TEXT, 7.0, -3.0), rel=1e-5)
    inputs = [IMAGE.clone(), TEXT.clone(), torch.tensor(7.0).double(), torch.tensor(-3.0).double()]
    for value in inputs:
        value.requires_grad_()
    image, text, scale, bias = torch.autograd.grad(matrix(*inputs), inputs)
    for place, expected in ((0, image), (1, text)):
        got = torch.cat([torch.from_numpy(grads[place]) for _, _, grads in ranks])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for place, expected in ((2, scale), (3, bias)):
        assert sum(float(grads[place]) for _, _, grads in ranks) == pytest.approx(expected.item(), rel=1e-4)
