"""Masked pixel regression against loops over the formula."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from altsight.losses.pixels import masked_mse_sum, normalize_patches, patchify, unpatchify


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_patchify_order_is_row_column_channel() -> None:
    images = random(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for b in range(2):
        for row in range(8):
            for column in range(12):
                for channel in range(3):
                    patch = row // 4 * 3 + column // 4
                    place = (row % 4 * 4 + column % 4) * 3 + channel
                    assert patches[b, patch, place] == images[b, channel, row, column]


def test_unpatchify_is_the_inverse() -> None:
    images = random(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)


def test_targets_have_mean_0_and_unbiased_std_1() -> None:
    target = normalize_patches(3 + 5 * random(2, 6, 48)).double().numpy()
    for patch in target.reshape(-1, 48):
        mean = sum(patch) / 48
        std = (sum((v - mean) ** 2 for v in patch) / 47) ** 0.5
        np.testing.assert_allclose([mean, std], [0, 1], atol=1e-5)


def test_target_of_a_flat_patch_is_zero() -> None:
    torch.testing.assert_close(normalize_patches(torch.full((1, 1, 48), 0.7)), torch.zeros(1, 1, 48), rtol=0, atol=1e-3)


def test_loss_equals_reference() -> None:
    pred, target = random(2, 6, 48), random(2, 6, 48, seed=1)
    masked = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]]).bool()
    expected = 0.0
    for b in range(2):
        for patch in range(6):
            if masked[b, patch]:
                errors = [(float(p) - float(t)) ** 2 for p, t in zip(pred[b, patch], target[b, patch], strict=True)]
                expected += sum(errors) / len(errors)
    loss = masked_mse_sum(pred, target, masked)
    assert loss.shape == () and loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_visible_targets_have_no_influence() -> None:
    pred, target = random(1, 4, 12).requires_grad_(), random(1, 4, 12, seed=1)
    masked = torch.tensor([[True, False, True, False]])
    loss = masked_mse_sum(pred, target, masked)
    visible, hidden = target.clone(), target.clone()
    visible[0, 1] += 10
    hidden[0, 0] += 10
    assert masked_mse_sum(pred, visible, masked) == loss
    assert masked_mse_sum(pred, hidden, masked) != loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert pred.grad is not None
    assert torch.equal(pred.grad[0].abs().sum(dim=1) > 0, masked[0])


def test_half_precision_predictions_are_compared_in_fp32() -> None:
    pred, target = random(1, 4, 12).bfloat16(), random(1, 4, 12, seed=1)
    masked = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(masked_mse_sum(pred, target, masked), masked_mse_sum(pred.float(), target, masked))
