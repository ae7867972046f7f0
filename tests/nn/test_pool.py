"""Attention pooling against torch's own multi-head attention; SigLIP's head against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.pool import AttentionPool, MAPHead


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(module: AttentionPool | MAPHead) -> AttentionPool | MAPHead:
    """Initialise `module` and move every parameter away from its start."""
    module.init_weights(key(0, 0))
    for number, parameter in enumerate(module.parameters()):
        parameter.add_(0.1 * random(*parameter.shape, seed=number))
    return module


def reference(pool: AttentionPool, queries: Tensor, tokens: Tensor) -> Tensor:
    """What torch's attention makes of the same weights, image by image."""
    width_out, width_in = pool.key.weight.shape
    attention = nn.MultiheadAttention(width_out, pool.heads, kdim=width_in, vdim=width_in)
    if width_in == width_out:
        attention.in_proj_weight = nn.Parameter(torch.cat([pool.query.weight, pool.key.weight, pool.value.weight]))
    else:
        attention.q_proj_weight, attention.k_proj_weight = pool.query.weight, pool.key.weight
        attention.v_proj_weight = pool.value.weight
    bias = torch.cat([pool.query.bias, torch.zeros(width_out), pool.value.bias])
    attention.in_proj_bias, attention.out_proj = nn.Parameter(bias), pool.out  # type: ignore[assignment]
    return torch.stack([attention(queries, image, image)[0] for image in tokens])


def test_pool_equals_reference() -> None:
    pool, tokens = trained(AttentionPool(24, 32, 4, queries=5)), random(3, 7, 24)
    assert isinstance(pool, AttentionPool)
    assert pool(tokens).shape == (3, 5, 32)
    torch.testing.assert_close(pool(tokens), reference(pool, pool.queries, tokens), rtol=1e-4, atol=1e-5)


def test_norms_act_on_queries_and_tokens() -> None:
    pool, tokens = trained(AttentionPool(24, 32, 4, queries=5, normed=True)), 3 + 2 * random(3, 7, 24)
    assert isinstance(pool, AttentionPool) and pool.query_norm is not None and pool.token_norm is not None
    queries = nn.functional.layer_norm(pool.queries, (32,), pool.query_norm.weight, pool.query_norm.bias)
    normed = nn.functional.layer_norm(tokens, (24,), pool.token_norm.weight, pool.token_norm.bias)
    torch.testing.assert_close(pool(tokens), reference(pool, queries, normed), rtol=1e-4, atol=1e-5)


def test_a_query_that_matches_one_token_returns_it() -> None:
    """With identity maps and one head, a long query along token 3 finds nothing but token 3."""
    pool = AttentionPool(8, 8, 1, queries=1)
    pool.init_weights(key(0, 0))
    tokens = torch.eye(8)[None]
    with torch.no_grad():
        for linear in (pool.query, pool.key, pool.value, pool.out):
            linear.weight.copy_(torch.eye(8))
        pool.queries.copy_(1000 * tokens[0, 3:4])
    torch.testing.assert_close(pool(tokens)[0, 0], tokens[0, 3])


def test_order_of_tokens_has_no_influence() -> None:
    head, tokens = trained(MAPHead(32, 4)), random(2, 9, 32)
    torch.testing.assert_close(head(tokens.flip(1)), head(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(head(2 * tokens), head(tokens), rtol=1e-2)


def test_map_head_equals_its_formula() -> None:
    """Attention of the probe, with no residual around it; then x + MLP(LN(x)), exact GELU."""
    head, tokens = trained(MAPHead(32, 4)), random(3, 7, 32)
    assert isinstance(head, MAPHead)
    x = reference(head.pool, head.pool.queries, tokens)[:, 0]
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    normed = (x - mean) / (variance + 1e-6).sqrt() * head.norm.weight + head.norm.bias
    hidden = normed @ head.mlp.fc1.weight.T + head.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = x + hidden @ head.mlp.fc2.weight.T + head.mlp.fc2.bias
    torch.testing.assert_close(head(tokens), expected, rtol=1e-4, atol=1e-5)


def test_size_and_start_of_the_map_head() -> None:
    head = MAPHead(96, 3)
    head.init_weights(key(0, 0))
    attention, mlp = 4 * 96 * 96 + 3 * 96, 2 * 96 * 384 + 384 + 96
    assert sum(p.numel() for p in head.parameters()) == 96 + attention + 2 * 96 + mlp
    assert head.pool.queries.shape == (1, 96)
    assert head.pool.queries.abs().max() <= (6 / 97) ** 0.5, "Xavier's bound"
    for linear in (head.pool.query, head.pool.out, head.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx((2 / sum(linear.weight.shape)) ** 0.5, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize("module", [AttentionPool(24, 32, 4, 5, normed=True), MAPHead(32, 4)])
def test_weights_are_a_function_of_the_key(module: AttentionPool | MAPHead) -> None:
    def start(seed: int) -> list[Tensor]:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(math.nan)
        module.init_weights(key(seed, 0))
        return [parameter.detach().clone() for parameter in module.parameters()]

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="3 heads do not divide the width 32"):
        AttentionPool(24, 32, 3, 1)
