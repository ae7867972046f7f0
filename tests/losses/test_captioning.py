"""Next-token cross-entropy against loops over the formula."""

from __future__ import annotations

import math

import pytest
import torch

from altsight.losses.captioning import next_token_ce_sum, target_count

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
