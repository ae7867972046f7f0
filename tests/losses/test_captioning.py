"""Cross-entropies of captions against loops over the formula."""

from __future__ import annotations

import math

import pytest
import torch

from altsight.losses.captioning import (
    backwards,
    next_token_ce_sum,
    target_count,
    token_ce_sum,
    token_set_ce_sum,
    token_set_count,
)
from altsight.nn.caption import is_text

PAD, START, END = 0, 1, 2
IDS = torch.tensor([[START, 5, 6, END, PAD, PAD], [START, END, PAD, PAD, PAD, PAD], [START, 4, 3, 7, 8, END]])
TARGETS = [[5, 6, END], [END], [4, 3, 7, 8, END]]


def slow(logits: torch.Tensor) -> float:
    total = 0.0
    for row, targets in enumerate(TARGETS):
        for t, token in enumerate(targets):
            scores = logits[row, t].double().tolist()
            total += math.log(sum(math.exp(s) for s in scores)) - scores[token]
    return total


def test_equals_reference() -> None:
    logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    loss = next_token_ce_sum(logits, IDS, END)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(logits), rel=1e-5)


def test_count() -> None:
    assert target_count(IDS, END).item() == sum(len(targets) for targets in TARGETS)


def test_padding_gets_no_gradient() -> None:
    logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    next_token_ce_sum(logits, IDS, END).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    learned = (logits.grad.abs().sum(dim=-1) > 0).tolist()
    assert learned == [[t < len(targets) for t in range(5)] for targets in TARGETS]


def test_padding_with_the_end_token_still_teaches_to_stop() -> None:
    logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    same = IDS.masked_fill(IDS == PAD, END)
    assert torch.equal(next_token_ce_sum(logits, same, END), next_token_ce_sum(logits, IDS, END))
    assert target_count(same, END) == target_count(IDS, END)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(next_token_ce_sum(logits, IDS, END), next_token_ce_sum(logits.float(), IDS, END))


def test_text_ends_with_the_first_end_token() -> None:
    expected = [[t <= len(targets) for t in range(6)] for targets in TARGETS]
    assert is_text(IDS, END).tolist() == expected
    assert is_text(IDS.masked_fill(IDS == PAD, END), END).tolist() == expected


def test_backwards_reverses_the_text_and_leaves_the_padding() -> None:
    text = is_text(IDS, END)
    turned = backwards(IDS, text)
    for before, after, targets in zip(IDS.tolist(), turned.tolist(), TARGETS, strict=True):
        length = len(targets) + 1
        assert after == before[:length][::-1] + [PAD] * (6 - length)
    assert torch.equal(backwards(turned, text), IDS)


def test_previous_tokens_equal_reference() -> None:
    logits, text = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1)), is_text(IDS, END)
    loss = token_ce_sum(logits, backwards(IDS, text)[:, 1:], text[:, 1:])
    total = 0.0
    for row, targets in enumerate(TARGETS):
        for t, token in enumerate([*targets[-2::-1], START]):  # what comes before the end, down to the start
            scores = logits[row, t].double().tolist()
            total += math.log(sum(math.exp(s) for s in scores)) - scores[token]
    assert loss.item() == pytest.approx(total, rel=1e-5)


def slow_set(logits: torch.Tensor) -> float:
    total = 0.0
    for row, ids in enumerate(IDS.tolist()):
        scores = logits[row].double().tolist()
        norm = math.log(sum(math.exp(s) for s in scores))
        different = set(ids) - {PAD, START, END}
        total += sum(norm - scores[token] for token in different) / max(len(different), 1)
    return total


def test_set_of_tokens_equals_reference() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    special = (PAD, START, END)
    assert token_set_ce_sum(logits, IDS, special).item() == pytest.approx(slow_set(logits), rel=1e-5)
    assert token_set_count(IDS, special).item() == 2  # the second caption is empty
    twice = IDS.clone()
    twice[0, 2] = 5
    once = IDS.clone()
    once[0, 2] = END
    assert torch.equal(token_set_ce_sum(logits, twice, special), token_set_ce_sum(logits, once, special))
