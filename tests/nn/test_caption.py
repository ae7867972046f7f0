"""Attention against plain softmax, and post-norm layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.nn.caption import Attention, PostNormLayer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module) -> None:
    """Give every parameter a value of its own, far from an initialisation."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=number + 1) * 0.4)


def slow_attention(attention: Attention, x: Tensor, context: Tensor, seen: list[list[bool]]) -> Tensor:
    """One row; head by head and query by query."""
    q, k, v = attention.query(x), attention.key(context), attention.value(context)
    width = x.shape[1] // attention.heads
    out = torch.zeros_like(q)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            keys = [s for s in range(len(context)) if seen[t][s]]
            scores = [float(q[t, part] @ k[s, part]) / math.sqrt(width) for s in keys]
            total = sum(math.exp(score) for score in scores)
            for s, score in zip(keys, scores, strict=True):
                out[t, part] += math.exp(score) / total * v[s, part]
    return attention.out(out)


@pytest.mark.parametrize("case", ["to another sequence", "causal", "masked"])
def test_attention_equals_reference(case: str) -> None:
    attention = Attention(12, 3)
    fill(attention)
    x = random(2, 4, 12)
    context = random(2, 6, 12, seed=9) if case == "to another sequence" else x
    seen = [[s <= t or case != "causal" for s in range(context.shape[1])] for t in range(4)]
    mask = None
    if case == "masked":
        seen = [[s == t or (s + t) % 2 == 0 for s in range(4)] for t in range(4)]
        mask = torch.tensor(seen)
    out = attention(x, context, mask, causal=case == "causal")
    for row in range(2):
        torch.testing.assert_close(
            out[row], slow_attention(attention, x[row], context[row], seen), rtol=1e-4, atol=1e-5
        )


def test_attention_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="width 10 is not divisible by its 3 heads"):
        Attention(10, 3)


@pytest.mark.parametrize("cross", [True, False])
def test_post_norm_layer_equals_reference(cross: bool) -> None:
    layer = PostNormLayer(12, 3, 20, 0.0, cross, nn.GELU())
    fill(layer)
    x, memory = random(2, 4, 12), random(2, 5, 12, seed=3)

    def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
        spread = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * module.weight + module.bias

    y = norm(x + layer.self_attention(x, x, causal=True), layer.self_norm)
    if cross:
        assert layer.cross_attention is not None and layer.cross_norm is not None
        y = norm(y + layer.cross_attention(y, memory), layer.cross_norm)
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    hidden = y @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    y = norm(y + hidden @ last.weight.T + last.bias, layer.norm)
    torch.testing.assert_close(layer(x, memory if cross else None, causal=True), y, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    layer = PostNormLayer(12, 3, 20, 0.5, True, nn.GELU())
    fill(layer)
    x, memory = random(2, 4, 12), random(2, 5, 12, seed=3)
    assert not torch.equal(layer(x, memory), layer(x, memory))
    layer.eval()
    assert torch.equal(layer(x, memory), layer(x, memory))
