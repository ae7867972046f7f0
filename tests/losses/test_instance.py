"""Losses between views against loops over their formulas, in one process and as the sum of the ranks' shares."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from altsight.core.dist import World
from altsight.losses import instance
from altsight.losses.instance import info_nce, negative_cosine, nt_xent, squared_distance

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.1),
    "info_nce": lambda a, b: info_nce(a, b, 0.2),
    "squared_distance": squared_distance,
    "negative_cosine": negative_cosine,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def slow_nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    """Sum over both views, mean over images, of -log softmax of the other view among all views but itself."""
    views = [*first.tolist(), *second.tolist()]
    n, total = len(first), 0.0
    for i, view in enumerate(views):
        partner = (i + n) % (2 * n)
        logits = {j: cosine(view, other) / temperature for j, other in enumerate(views) if j != i}
        total += math.log(sum(math.exp(x) for x in logits.values())) - logits[partner]
    return total / n


def slow_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> float:
    """2 T times the mean of -log softmax of the own key among all keys."""
    total = 0.0
    for i, query in enumerate(queries.tolist()):
        logits = [cosine(query, k) / temperature for k in keys.tolist()]
        total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return 2 * temperature * total / len(queries)


def slow_mean_cosine(a: Tensor, b: Tensor) -> float:
    return sum(cosine(u, v) for u, v in zip(a.tolist(), b.tolist(), strict=True)) / len(a)


SLOW: dict[str, Callable[[Tensor, Tensor], float]] = {
    "nt_xent": lambda a, b: slow_nt_xent(a, b, 0.1),
    "info_nce": lambda a, b: slow_info_nce(a, b, 0.2),
    "squared_distance": lambda a, b: 2 - 2 * slow_mean_cosine(a, b),
    "negative_cosine": lambda a, b: -slow_mean_cosine(a, b),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_reference(name: str) -> None:
    a, b = random(6, 8), random(6, 8, seed=1)
    loss = LOSSES[name](a, b)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SLOW[name](a, b), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_length_has_no_influence_and_autocast_neither(name: str) -> None:
    a, b = random(6, 8).float(), random(6, 8, seed=1).float()
    expected = LOSSES[name](a, b)
    torch.testing.assert_close(LOSSES[name](a * torch.arange(1, 7).unsqueeze(1), b * 3), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](a, b), expected)


def test_values_at_the_ends() -> None:
    """Equal views: distance 0, cosine 1; NT-Xent of N orthogonal pairs is known."""
    a = torch.eye(5)
    assert squared_distance(a, a).item() == pytest.approx(0, abs=1e-6)
    assert squared_distance(a, -a).item() == pytest.approx(4)
    assert negative_cosine(a, a).item() == pytest.approx(-1)
    assert nt_xent(a, a, 0.5).item() == pytest.approx(2 * (math.log(math.exp(2) + 8) - 2))
    assert info_nce(a, a, 0.5).item() == pytest.approx(math.log(math.exp(2) + 4) - 2)


@pytest.mark.parametrize("name", ["info_nce", "squared_distance", "negative_cosine"])
def test_targets_are_constants(name: str) -> None:
    a, b = random(6, 8).requires_grad_(), random(6, 8, seed=1).requires_grad_()
    LOSSES[name](a, b).backward()
    assert a.grad is not None and a.grad.abs().max() > 0
    assert b.grad is None


def test_nt_xent_has_a_gradient_in_both_views_and_is_symmetric() -> None:
    a, b = random(6, 8).requires_grad_(), random(6, 8, seed=1).requires_grad_()
    grads = torch.autograd.grad(nt_xent(a, b, 0.1), [a, b])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    torch.testing.assert_close(nt_xent(b, a, 0.1), nt_xent(a, b, 0.1))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_ranks_sum_to_the_loss_with_its_gradient(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank is played in turn; `gather` returns what all ranks hold, with its gradient."""
    a, b = random(8, 5).requires_grad_(), random(8, 5, seed=1).requires_grad_()
    wanted = [a, b] if name == "nt_xent" else [a]
    whole = torch.autograd.grad(LOSSES[name](a, b), wanted)
    gathered = {"nt_xent": [a, b], "info_nce": [b.detach()]}.get(name, [])
    n, shares = 8 // ranks, []
    for rank in range(ranks):
        everyone = iter([torch.nn.functional.normalize(x.float(), dim=-1) for x in gathered])
        monkeypatch.setattr(instance, "world", lambda rank=rank: World(rank, ranks))
        monkeypatch.setattr(instance, "gather", lambda x, everyone=everyone: next(everyone))
        mine = slice(rank * n, (rank + 1) * n)
        shares.append(LOSSES[name](a[mine], b[mine]))
        assert next(everyone, None) is None
    total = torch.stack(shares).sum()
    assert total.item() == pytest.approx(SLOW[name](a.detach(), b.detach()), rel=1e-5)
    for ours, expected in zip(torch.autograd.grad(total, wanted), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
