"""Encoders at another size: a copy, whose positions are those of the old grid in between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.resample import POSITIONS, resized

TINY = {"model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}


def encoder(**fields: object) -> Encoder:
    made = Encoder(EncoderConfig(**(TINY | {"positions": "learned"} | fields)))  # type: ignore[arg-type]
    made.init_weights(key(0, 0))
    if made.is_vit and made.backbone.pos_embed is not None:
        with torch.no_grad():
            made.backbone.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    return made.eval()


def test_without_changes_it_is_a_copy() -> None:
    original = encoder()
    copied = resized(original).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(original(images).tokens, copied(images).tokens)
    with torch.no_grad():
        copied.backbone.pos_embed.zero_()
    assert original.backbone.pos_embed.abs().sum() > 0


@pytest.mark.parametrize("registers", [0, 2])
def test_positions_are_interpolated_bicubically_and_prefix_rows_kept(registers: int) -> None:
    original = encoder(registers=registers)
    larger = resized(original, img_size=64)
    old, new = original.state_dict()[POSITIONS], larger.state_dict()[POSITIONS]
    rows = old.shape[1] - 16
    assert new.shape[1] == rows + 64
    assert torch.equal(old[:, :rows], new[:, :rows])
    square = old[:, rows:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (8, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 64, 32)
    torch.testing.assert_close(new[:, rows:], expected)


def test_a_constant_table_stays_constant() -> None:
    original = encoder()
    with torch.no_grad():
        original.backbone.pos_embed.fill_(0.5)
    torch.testing.assert_close(resized(original, img_size=48).backbone.pos_embed, torch.full((1, 37, 32), 0.5))


def test_patches_of_twice_the_size_see_the_enlarged_image_alike() -> None:
    """FlexiViT's pseudo-inverse: a patch enlarged by the same resize has the embedding that the small one had."""
    original = encoder()
    larger = resized(original, img_size=64, patch_size=16)
    image = torch.rand(1, 3, 8, 8)
    enlarged = F.interpolate(image, (16, 16), mode="bicubic", antialias=True)
    small = original.backbone.patch_embed.proj(image).flatten()
    torch.testing.assert_close(larger.backbone.patch_embed.proj(enlarged).flatten(), small, atol=1e-4, rtol=1e-4)


def test_a_resnet_takes_any_size() -> None:
    original = Encoder(EncoderConfig("resnet18", img_size=64))
    original.init_weights(key(0, 0))
    larger = resized(original.eval(), img_size=128).eval()
    assert larger.grid == (4, 4)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(larger(images).tokens, original(images).tokens)


def test_relative_positions_keep_their_size() -> None:
    original = encoder(positions="none", relative_positions=True)
    with pytest.raises(UserError, match="32 pixels only"):
        resized(original, img_size=64)
    assert resized(original, drop_path=0.1).relative is not None
