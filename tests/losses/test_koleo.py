"""KoLeo against loops over the formula, its invariances, and the ranks' shares."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.dist import World
from altsight.losses import koleo as module
from altsight.losses.koleo import koleo


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(features: Tensor) -> float:
    """-mean_i log(min_{j != i} |x_i - x_j| + 1e-8) on the unit sphere, pair by pair."""
    rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.double().tolist()]
    total = 0.0
    for i, a in enumerate(rows):
        near = min(math.dist(a, b) for j, b in enumerate(rows) if j != i)
        total -= math.log(near + 1e-8)
    return total / len(rows)


def test_equals_reference() -> None:
    features = random(12, 5) * torch.arange(1, 13).unsqueeze(1)
    loss = koleo(features)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(features), rel=1e-4)


def test_rotation_has_no_influence() -> None:
    features, (rotation, _) = random(32, 8), torch.linalg.qr(random(8, 8, seed=1))
    assert koleo(features @ rotation).item() == pytest.approx(koleo(features).item(), rel=1e-4)


def test_equal_features_are_finite_and_so_is_the_gradient() -> None:
    features = random(6, 8)
    features[3] = features[2]
    features.requires_grad_()
    loss = koleo(features)
    loss.backward()
    assert math.isfinite(loss.item()) and features.grad is not None and features.grad.isfinite().all()
    assert math.isfinite(koleo(features[:1]).item()), "a lone sample has no neighbour but itself"


def test_is_computed_in_fp32_under_autocast() -> None:
    features = random(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo(features), koleo(features.clone()))
        assert koleo(features).item() == pytest.approx(slow(features), rel=1e-4)


def test_descent_spreads_collapsed_features() -> None:
    spread, close = random(64, 16), random(1, 16) + 0.02 * random(64, 16, seed=1)
    assert koleo(close) > koleo(spread) + 2
    features = close.clone().requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        koleo(features).backward()
        optimizer.step()
    before, after = (F.normalize(x.detach(), dim=1).std(dim=0).mean() for x in (close, features))
    assert after > 3 * before
    assert koleo(features) < koleo(close) - 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_ranks_sum_to_the_loss_with_its_gradient(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is played in turn; `gather` returns what all ranks hold, with its gradient."""
    features = random(12, 5).requires_grad_()
    (whole,) = torch.autograd.grad(koleo(features), features)
    n = 12 // ranks
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(module, "world", lambda rank=rank: World(rank, ranks))
        monkeypatch.setattr(module, "gather", lambda x: F.normalize(features, dim=-1))
        shares.append(koleo(features[rank * n : (rank + 1) * n]))
    total = torch.stack(shares).sum()
    assert total.item() == pytest.approx(slow(features.detach()), rel=1e-4)
    (ours,) = torch.autograd.grad(total, features)
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
