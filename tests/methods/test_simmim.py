"""SimMIM's loss against loops over the formula, its squares, its reconstruction, its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.simmim import SimMIM
from altsight.nn.encoder import Encoder, EncoderConfig

CONFIG = SimMIM.Config(mask_unit=16)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASKED = ((0, 1, 4, 5), (2, 3, 6, 7, 8, 9, 12, 13), (10, 11, 14, 15))
"""Masked patches of three images: squares of 2 x 2."""


def make(encoder: Encoder, config: SimMIM.Config = CONFIG) -> SimMIM:
    method = SimMIM(config, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def masked(batch: Batch) -> Batch:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, patches in enumerate(MASKED):
        mask[row, list(patches)] = True
    return dataclasses.replace(batch, tensors={"image": batch["image"], "mask": mask})


def predictions(method: SimMIM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the head predicts inside of `embed`, and the local losses."""
    outputs: list[Tensor] = []
    handle = method.head.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    local = method.embed(batch, key(0, 0)).local
    handle.remove()
    return outputs[0], local


def slow_loss(pred: Tensor, images: Tensor) -> float:
    """Return SimMIM's loss pixel by pixel: sum of absolute errors / (masked pixels + 1e-5) / 3 channels."""
    total, pixels = 0.0, 0
    for row, patches in enumerate(MASKED):
        for patch in patches:
            top, left = patch // 4 * 8, patch % 4 * 8
            values = iter(pred[row, patch].tolist())
            for y in range(8):
                for x in range(8):
                    pixels += 1
                    for c in range(3):
                        target = (int(images[row, c, top + y, left + x]) / 255 - MEAN[c]) / STD[c]
                        total += abs(next(values) - target)
    return total / (pixels + 1e-5) / 3


def test_loss_equals_reference(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    pred, local = predictions(method, masked)
    counts = method.counts(masked)
    assert counts["pixels"].item() == 16
    assert (local["pixels"] / counts["pixels"]).item() == pytest.approx(slow_loss(pred, masked["image"]), rel=1e-5)


def test_visible_pixels_are_no_targets_and_masked_ones_are_not_seen(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    before, local = predictions(method, masked)
    for patch in range(16):
        image = masked["image"].clone()
        top, left = patch // 4 * 8, patch % 4 * 8
        image[0, :, top : top + 8, left : left + 8] += 100
        changed = dataclasses.replace(masked, tensors={**masked.tensors, "image": image})
        after, _ = predictions(method, changed)
        assert torch.equal(after[0], before[0]) is (patch in MASKED[0])
    # For given predictions, a visible pixel is no target.
    method.head.register_forward_hook(lambda module, inputs, output: before)
    for patch in (0, 2):
        image = masked["image"].clone()
        image[0, :, 0, 8 * patch] += 100
        changed = dataclasses.replace(masked, tensors={**masked.tensors, "image": image})
        same = torch.equal(method.embed(changed, key(0, 0)).local["pixels"], local["pixels"])
        assert same is (patch not in MASKED[0])


def test_reconstruction(encoder: Encoder, masked: Batch) -> None:
    method, original = make(encoder).train(), masked["image"].float() / 255
    out = method.reconstruct(masked)
    assert out.shape == (3, 3, 32, 32) and out.min() >= 0 and out.max() <= 1
    assert method.training and not out.requires_grad
    for patch in range(16):
        top, left = patch // 4 * 8, patch % 4 * 8
        area = (0, slice(None), slice(top, top + 8), slice(left, left + 8))
        assert torch.allclose(out[area], original[area], atol=1e-5) is (patch not in MASKED[0])
    images = encoder.normalize(masked["image"])
    perfect = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, 192)
    method.head.register_forward_hook(lambda module, inputs, output: perfect)
    torch.testing.assert_close(method.reconstruct(masked), original, rtol=0, atol=1e-5)


def test_prepare(encoder: Encoder, document: Callable[..., Document]) -> None:
    prepare, at = make(encoder).prepare(Crop(), 32), key(0, 5)
    example = prepare(document(text=None), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert int(example["mask"].sum()) == 3 * 4, "0.6 of 4 squares, rounded up"
    assert prepare(Document((), "empty"), at) is None


def test_settings_of_the_paper() -> None:
    """Specification B3: 30 of 7 x 7 squares, a head of one 1 x 1 convolution, and the multi-step schedule."""
    with torch.device("meta"):
        method = SimMIM(SimMIM.Config(), Encoder(EncoderConfig()), Corpus())
    prepare = method.prepare(Crop(), 224)
    assert (prepare.grid, prepare.unit, prepare.ratio) == ((14, 14), 2, 0.6)
    assert sum(p.numel() for p in method.head.parameters()) == 768 * 768 + 768
    optim = SimMIM.optim
    assert optim.peak_lr(2048) == pytest.approx(4e-4)
    assert (optim.schedule, optim.step_at, optim.clip_norm) == ("step", 0.875, 5.0)


def test_no_decay_for_positions_and_class_token() -> None:
    """Specification E1 ("listed names"): the mask token and the table of relative positions are not among them."""
    config = EncoderConfig(
        "vit_tiny_patch16_224", 32, 8, width=32, depth=1, heads=2, positions="learned", relative_positions=True
    )
    method = make(Encoder(config))
    assert method.no_weight_decay() == {
        "encoder.backbone.cls_token",
        "encoder.backbone.pos_embed",
    }
    assert method.mask_token.ndim > 1


@pytest.mark.parametrize(("unit", "near"), [(32, None), (12, 8), (24, 16), (4, 8), (64, 32)])
def test_squares_that_do_not_fit(encoder: Encoder, unit: int, near: int | None) -> None:
    told = f"set --method.mask-unit {near}" if near else "some of the 1 squares visible and some masked"
    with pytest.raises(UserError, match=told):
        make(encoder, SimMIM.Config(mask_unit=unit))


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_ratio_that_leaves_nothing(encoder: Encoder, ratio: float) -> None:
    with pytest.raises(UserError, match=f"mask ratio of {ratio:g} must leave some of the 4 squares"):
        make(encoder, SimMIM.Config(mask_unit=16, mask_ratio=ratio))
