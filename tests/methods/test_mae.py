"""MAE's loss against loops over the formula, its mask, its reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.mae import MAE
from altsight.nn.decoder import PixelDecoderConfig
from altsight.nn.encoder import Encoder, EncoderConfig

CONFIG = MAE.Config(decoder=PixelDecoderConfig(width=16, depth=1, heads=2))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(encoder: Encoder, corpus: Corpus, config: MAE.Config = CONFIG) -> MAE:
    method = MAE(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def slow_loss_sum(pred: Tensor, images: Tensor, keep: Tensor, norm_pix: bool) -> float:
    """Sum over masked patches of the mean squared error, from uint8 images, pixel by pixel."""
    total = 0.0
    for b in range(len(images)):
        for patch in set(range(16)) - set(keep[b].tolist()):
            top, left = patch // 4 * 8, patch % 4 * 8
            target = [
                (int(images[b, c, top + y, left + x]) / 255 - MEAN[c]) / STD[c]
                for y in range(8)
                for x in range(8)
                for c in range(3)
            ]
            if norm_pix:
                mean = sum(target) / len(target)
                variance = sum((v - mean) ** 2 for v in target) / (len(target) - 1)
                target = [(v - mean) / (variance + 1e-6) ** 0.5 for v in target]
            total += sum((p - v) ** 2 for p, v in zip(pred[b, patch].tolist(), target, strict=True)) / len(target)
    return total


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_reference(encoder: Encoder, corpus: Corpus, batch: Batch, norm_pix: bool) -> None:
    method = make(encoder, corpus, dataclasses.replace(CONFIG, norm_pix=norm_pix))
    predictions: list[Tensor] = []
    method.pixels.decoder.register_forward_hook(lambda module, inputs, output: predictions.append(output.detach()))
    local = method.embed(batch, key(0, 0)).local
    expected = slow_loss_sum(predictions[0], batch["image"], batch["keep"], norm_pix)
    np.testing.assert_allclose(local["pixels"].item(), expected, rtol=1e-5)
    assert method.counts(batch)["pixels"].item() == 3 * 12


def test_visible_pixels_are_no_targets(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    """For a given encoding, only the pixels of masked patches matter."""
    method = make(encoder, corpus)
    images, keep = encoder.normalize(batch["image"]), batch["keep"]
    tokens = encoder(images, keep).tokens
    loss = method.pixels.loss_sum(tokens, keep, images)
    for patch in range(16):
        changed = images.clone()
        top, left = patch // 4 * 8, patch % 4 * 8
        changed[0, :, top : top + 8, left : left + 8] = changed[0, :, top : top + 8, left : left + 8].flip(1)
        visible = patch in keep[0].tolist()
        assert torch.equal(method.pixels.loss_sum(tokens, keep, changed), loss) is visible


def test_masked_and_visible_patches_make_the_image(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    masked = make(encoder, corpus).pixels.masked(batch["keep"], (4, 4))
    for row, keep in zip(masked, batch["keep"], strict=True):
        assert sorted([*row.nonzero().flatten().tolist(), *keep.tolist()]) == list(range(16))


def test_position_tables_get_no_gradient_and_the_rest_does(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus)
    method.embed(batch, key(0, 0)).local["pixels"].backward()  # type: ignore[no-untyped-call]
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == {"encoder.backbone.pos_embed", "pixels.decoder.positions"}


def test_reconstruction_with_a_perfect_decoder_is_the_image(
    encoder: Encoder, corpus: Corpus, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(encoder, corpus).train()
    images = encoder.normalize(batch["image"])
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, 192)
    perfect = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(method.pixels.decoder, "forward", lambda tokens, keep: perfect)
    out = method.reconstruct(batch)
    torch.testing.assert_close(out, batch["image"].float() / 255, rtol=0, atol=1e-5)
    assert method.training and not out.requires_grad


def test_reconstruction_keeps_visible_patches(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = make(encoder, corpus)
    out, original = method.reconstruct(batch), batch["image"].float() / 255
    assert out.shape == (3, 3, 32, 32) and out.min() >= 0 and out.max() <= 1
    for patch in range(16):
        top, left = patch // 4 * 8, patch % 4 * 8
        same = torch.allclose(
            out[0, :, top : top + 8, left : left + 8], original[0, :, top : top + 8, left : left + 8], atol=1e-5
        )
        assert same is (patch in batch["keep"][0].tolist())


def test_prepare(encoder: Encoder, corpus: Corpus, document: Callable[..., Document]) -> None:
    at = key(0, 5)
    example = make(encoder, corpus).prepare(Crop(), 32)(document(text=None), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert example["keep"].shape == (4,) and example["keep"].dtype == torch.int64
    assert make(encoder, corpus).prepare(Crop(), 32)(Document((), "empty"), at) is None


@pytest.mark.parametrize("ratio", [0.0, 0.97])
def test_mask_ratio_that_leaves_nothing(encoder: Encoder, corpus: Corpus, ratio: float) -> None:
    with pytest.raises(UserError, match=f"mask ratio of {ratio:g} must leave some of the 16 patches"):
        make(encoder, corpus, dataclasses.replace(CONFIG, mask_ratio=ratio))


def test_nothing_of_two_dimensions_is_exempt_from_decay(encoder: Encoder, corpus: Corpus) -> None:
    assert make(encoder, corpus).no_weight_decay() == set()


@pytest.mark.parametrize(
    ("model", "encoder_millions", "millions"),
    [("vit_base_patch16_224", 85.80, 111.91), ("vit_large_patch16_224", 303.30, 329.54)],
)
def test_published_sizes(model: str, encoder_millions: float, millions: float) -> None:
    """ViT-B and ViT-L (86 M and 303 M, specification 0.2), and the models of MAE's release with their decoder."""
    with torch.device("meta"):
        method = MAE(MAE.Config(), Encoder(EncoderConfig(model)), Corpus())
    sizes = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (method.encoder, method)]
    assert sizes == pytest.approx([encoder_millions, millions], abs=0.005)
