"""Losses of self-training, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from altsight.losses.selftrain import (
    UNSURE,
    fairness,
    log_mean_prediction,
    masked_alignment_sum,
    pseudo_ce_sum,
    pseudo_labels,
)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def test_pseudo_labels_are_confident_answers(logits: torch.Tensor) -> None:
    labels = pseudo_labels(logits, 0.7)
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in row.tolist()) for x in row.tolist()]
        assert label == (p.index(max(p)) if max(p) > 0.7 else UNSURE)
    assert 0 < int((labels == UNSURE).sum()) < 7, "the example has both kinds"


def test_cross_entropy_is_that_of_the_confident(logits: torch.Tensor) -> None:
    labels = torch.tensor([0, UNSURE, 2, 3, UNSURE, 1, 4])
    want = sum(-math.log(row.double().softmax(0)[k]) for row, k in zip(logits, labels, strict=True) if k != UNSURE)
    assert float(pseudo_ce_sum(logits, labels)) == pytest.approx(want, rel=1e-5)
    nobody = torch.full((7,), UNSURE)
    logits.requires_grad_()
    loss = pseudo_ce_sum(logits, nobody)
    loss.backward()
    assert float(loss.detach()) == 0 and float(logits.grad.abs().max()) == 0


def test_fairness_is_the_mean_log_of_the_mean_prediction(logits: torch.Tensor) -> None:
    mean = logits.double().softmax(dim=1).mean(dim=0)
    want = -sum(math.log(p) for p in mean.tolist()) / 5
    assert float(fairness(log_mean_prediction(logits))) == pytest.approx(want, rel=1e-6)


def test_fairness_is_least_where_all_classes_are_used_evenly() -> None:
    even = (8 * torch.eye(5)).requires_grad_()
    loss = fairness(log_mean_prediction(even))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(5), rel=1e-6)
    assert float(even.grad.abs().max()) < 1e-7
    one = torch.zeros(5, 5)
    one[:, 0] = 8
    assert float(fairness(log_mean_prediction(one))) > math.log(5) + 1


def test_fairness_is_finite_where_a_class_has_no_probability_left() -> None:
    logits = torch.tensor([[200.0, 0.0], [300.0, 0.0]], requires_grad=True)
    loss = fairness(log_mean_prediction(logits))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((200 + math.log(2)) / 2, rel=1e-6)
    assert bool(logits.grad.isfinite().all())


def test_alignment_is_the_squared_distance_of_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    image = torch.randn(2, 4, generator=generator, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    want = 0.0
    for b, patch in mask.nonzero().tolist():
        z, w = patches[b, patch].double(), image[b].double()
        want += float((z / z.norm() - w / w.norm()).square().sum())
    loss = masked_alignment_sum(patches, image, mask)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert float(image.grad.abs().max()) > 0
    assert float(patches.grad[~mask].abs().max()) == 0 < float(patches.grad[mask].abs().max())
