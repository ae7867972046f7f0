"""The encoder against timm's own forward, masked encoding, positions, initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.init import sincos_2d

TINY = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2)


def tiny(**changes: Any) -> Encoder:
    encoder = Encoder(EncoderConfig(**{**TINY.__dict__, **changes}))
    encoder.init_weights(key(0, 0))
    return encoder.eval()


def images(size: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (EncoderConfig("vit_tiny_patch16_224", img_size=64), {"img_size": 64}),
        (EncoderConfig("vit_small_patch16_224", img_size=64, registers=4), {"img_size": 64, "reg_tokens": 4}),
        (EncoderConfig("resnet50", img_size=64), {}),
    ],
    ids=lambda value: value.model if isinstance(value, EncoderConfig) else "",
)
def test_features_equal_timm(config: EncoderConfig, arguments: dict[str, int]) -> None:
    encoder = Encoder(config)
    encoder.init_weights(key(0, 0))
    create: Any = timm.create_model
    reference = create(config.model, num_classes=0, **arguments)
    reference.load_state_dict(encoder.backbone.state_dict())
    encoder.eval(), reference.eval()
    x = images(64)
    with torch.no_grad():
        encoded = encoder(x)
        expected = reference.forward_features(x)
        pooled = reference.forward_head(expected, pre_logits=True)
    tokens = expected if encoder.is_vit else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoded.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.point(encoded, "pooled"), pooled, rtol=1e-5, atol=1e-5)
    assert encoded.patches.shape[1] == encoder.num_patches
    assert pooled.std() > 1e-3


@pytest.mark.parametrize("registers", [0, 4])
def test_all_patches_kept_equals_unmasked(registers: int) -> None:
    encoder = tiny(registers=registers)
    keep = torch.arange(encoder.num_patches).expand(2, -1)
    torch.testing.assert_close(encoder(images(32), keep).tokens, encoder(images(32)).tokens)


def test_tokens_carry_their_position() -> None:
    """A permuted `keep` permutes the output tokens: their positions travel with them."""
    encoder = tiny()
    order = torch.randperm(encoder.num_patches, generator=torch.Generator().manual_seed(1))
    shuffled = encoder(images(32), order.expand(2, -1)).patches
    torch.testing.assert_close(shuffled, encoder(images(32)).patches[:, order], rtol=1e-4, atol=1e-5)


def test_blocks_see_exactly_the_visible_tokens() -> None:
    encoder = tiny(registers=2)
    seen: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    for block in encoder.backbone.blocks:
        block.register_forward_pre_hook(count)
    keep = torch.tensor([[0, 3, 7, 9], [1, 2, 14, 15]])
    encoded = encoder(images(32), keep)
    assert seen == [1 + 2 + 4] * 2
    assert encoded.patches.shape == (2, 4, 32)


def test_hidden_patches_have_no_influence() -> None:
    encoder = tiny()
    keep = torch.tensor([[0, 5, 10, 15]])
    x = images(32, n=1)
    hidden, visible = x.clone(), x.clone()
    hidden[:, :, :8, 8:16] += 1  # patch 1
    visible[:, :, 8:16, 8:16] += 1  # patch 5
    tokens = encoder(x, keep).tokens
    assert torch.equal(encoder(hidden, keep).tokens, tokens)
    assert not torch.allclose(encoder(visible, keep).tokens, tokens)


def test_convolutional_backbone_refuses_masks() -> None:
    encoder = Encoder(EncoderConfig("resnet18", img_size=64))
    with pytest.raises(UserError, match="resnet18"):
        encoder(images(64), torch.zeros(2, 1, dtype=torch.long))


def test_sincos_table_is_the_formula() -> None:
    width, rows, columns = 16, 3, 5
    table = sincos_2d(width, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * columns + column], torch.tensor(expected))


def test_fixed_positions_get_no_gradient_and_learned_ones_do() -> None:
    for positions, learns in (("sincos", False), ("learned", True)):
        encoder = tiny(positions=positions)
        encoder.point(encoder(images(32)), "mean").square().sum().backward()  # type: ignore[no-untyped-call]
        assert (encoder.backbone.pos_embed.grad is not None) is learns
        assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_class_token_has_position_zero_under_sincos() -> None:
    encoder = tiny(registers=2)
    assert torch.equal(encoder.backbone.pos_embed[0, : -encoder.num_patches].abs().sum(), torch.tensor(0.0))
    assert torch.equal(encoder.backbone.pos_embed[0, -encoder.num_patches :], sincos_2d(32, (4, 4)))


def test_size_that_the_patches_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"30 is not divisible by the patch size 8.*24 or 32"):
        tiny(img_size=30)
