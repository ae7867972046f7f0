"""The contrastive loss against loops over the formula, in one process and as the sum of the ranks' shares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from altsight.core.dist import World
from altsight.losses import contrastive
from altsight.losses.contrastive import clip_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(image: Tensor, text: Tensor, scale: float) -> float:
    """1/2 [CE(rows, diagonal) + CE(columns, diagonal)] of scale * cosine, pair by pair."""

    def unit(v: list[float]) -> list[float]:
        norm = math.sqrt(sum(x * x for x in v))
        return [x / norm for x in v]

    u, v = [unit(row) for row in image.tolist()], [unit(row) for row in text.tolist()]
    logits = [[scale * sum(a * b for a, b in zip(x, y, strict=True)) for y in v] for x in u]
    n = len(u)
    total = 0.0
    for i in range(n):
        rows = math.log(sum(math.exp(logits[i][j]) for j in range(n))) - logits[i][i]
        columns = math.log(sum(math.exp(logits[j][i]) for j in range(n))) - logits[i][i]
        total += (rows + columns) / (2 * n)
    return total


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_reference(scale: float) -> None:
    image, text = random(6, 8), random(6, 8, seed=1)
    loss = clip_loss(image, text, torch.tensor(scale))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(image, text, scale), rel=1e-5)


def test_is_computed_in_fp32_under_autocast() -> None:
    image, text, scale = random(6, 8).float(), random(6, 8, seed=1).float(), torch.tensor(100.0)
    expected = clip_loss(image, text, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(image, text, scale), expected)


def test_length_of_features_has_no_influence() -> None:
    image, text, scale = random(6, 8), random(6, 8, seed=1), torch.tensor(10.0)
    stretched = image * torch.arange(1, 7).unsqueeze(1)
    torch.testing.assert_close(clip_loss(stretched, text, scale), clip_loss(image, text, scale))


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_ranks_sum_to_the_loss_with_its_gradient(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is played in turn; `gather` returns what all ranks hold, with its gradient."""
    image, text = random(8, 5).requires_grad_(), random(8, 5, seed=1).requires_grad_()
    scale = torch.tensor(7.0, requires_grad=True)
    whole = torch.autograd.grad(clip_loss(image, text, scale), [image, text, scale])
    n = 8 // ranks
    share_of_rank = []
    for rank in range(ranks):
        everyone = iter([torch.nn.functional.normalize(x.float(), dim=-1) for x in (image, text)])
        monkeypatch.setattr(contrastive, "world", lambda rank=rank: World(rank, ranks))
        monkeypatch.setattr(contrastive, "gather", lambda x, everyone=everyone: next(everyone))
        mine = slice(rank * n, (rank + 1) * n)
        share_of_rank.append(clip_loss(image[mine], text[mine], scale))
    total = torch.stack(share_of_rank).sum()
    assert total.item() == pytest.approx(slow(image.detach(), text.detach(), 7.0), rel=1e-5)
    for ours, expected in zip(torch.autograd.grad(total, [image, text, scale]), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
