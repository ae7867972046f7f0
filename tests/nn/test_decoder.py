"""The pixel decoder's bookkeeping, and the caption decoder against a slow numpy reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.decoder import CaptionDecoder, CaptionDecoderConfig, PixelDecoder, PixelDecoderConfig, rotary
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.init import sincos_2d

Floats = Any
"""A numpy array of float64."""
SMALL = CaptionDecoderConfig(width=24, unimodal_layers=1, multimodal_layers=1, heads=3, head_dim=8, ff_mult=2, length=8)


def pixel_decoder(registers: int = 0) -> PixelDecoder:
    config = EncoderConfig(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2, registers=registers
    )
    decoder = PixelDecoder(PixelDecoderConfig(width=16, depth=2, heads=2), Encoder(config))
    decoder.init_weights(key(0, 0))
    return decoder


def caption_decoder(config: CaptionDecoderConfig = SMALL, vocab: int = 11, latent: int = 20) -> CaptionDecoder:
    decoder = CaptionDecoder(config, vocab, latent)
    decoder.init_weights(key(0, 0))
    return decoder


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("registers", [0, 2])
def test_pixel_decoder_restores_the_order(registers: int) -> None:
    decoder = pixel_decoder(registers)
    prefix = 1 + registers
    keep = torch.tensor([[9, 2, 14], [0, 15, 7]])
    tokens = random(2, prefix + 3, 32)
    entering: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0])

    decoder.blocks.register_forward_pre_hook(catch)
    out = decoder(tokens, keep)
    assert out.shape == (2, 16, 8 * 8 * 3)
    table = sincos_2d(16, (4, 4))
    embedded = decoder.embed(tokens)
    torch.testing.assert_close(entering[0][:, :prefix], embedded[:, :prefix])
    for row in range(2):
        for patch in range(16):
            if patch in keep[row]:
                expected = embedded[row, prefix + keep[row].tolist().index(patch)]
            else:
                expected = decoder.mask_token[0, 0]
            torch.testing.assert_close(entering[0][row, prefix + patch], expected + table[patch])


def test_pixel_decoder_ignores_the_order_of_visible_tokens() -> None:
    decoder = pixel_decoder()
    keep, tokens = torch.tensor([[2, 9, 14]]), random(1, 4, 32)
    shuffled = decoder(tokens[:, [0, 3, 1, 2]], keep[:, [2, 0, 1]])
    torch.testing.assert_close(shuffled, decoder(tokens, keep))


def test_pixel_decoder_gradients() -> None:
    decoder = pixel_decoder()
    decoder(random(1, 4, 32), torch.tensor([[2, 9, 14]])).square().sum().backward()
    assert decoder.positions.grad is None and not decoder.positions.requires_grad
    assert all(p.grad is not None for name, p in decoder.named_parameters() if name != "positions")


def test_pixel_decoder_refuses_a_width_without_sincos() -> None:
    with pytest.raises(UserError, match=r"width 18 must be divisible by 4"):
        PixelDecoder(PixelDecoderConfig(18, 1, 3), Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=32)))


def test_mae_vit_base_has_111_9_million_parameters() -> None:
    """Counted by hand from the published architecture, fixed position tables included."""
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig("vit_base_patch16_224"))
        decoder = PixelDecoder(PixelDecoderConfig(), encoder)

    def linear(a: int, b: int) -> int:
        return a * b + b

    def block(w: int) -> int:
        return 2 * 2 * w + linear(w, 3 * w) + linear(w, w) + linear(w, 4 * w) + linear(4 * w, w)

    in_encoder = 768 + 197 * 768 + linear(768, 768) + 12 * block(768) + 2 * 768
    in_decoder = linear(768, 512) + 512 + 197 * 512 + 8 * block(512) + 2 * 512 + linear(512, 768)
    assert sum(p.numel() for p in encoder.parameters()) == in_encoder
    assert sum(p.numel() for p in decoder.parameters()) == in_decoder
    assert (round(in_encoder / 1e6, 1), round((in_encoder + in_decoder) / 1e6, 1)) == (85.8, 111.9)


def test_rotary_is_a_complex_rotation() -> None:
    x = random(2, 3, 5, 8).double()
    out = rotary(x.float()).double()
    for t in range(5):
        for i in range(4):
            turned = torch.complex(x[..., t, i], x[..., t, i + 4]) * np.exp(1j * t / 10000 ** (2 * i / 8))
            torch.testing.assert_close(out[..., t, i], turned.real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out[..., t, i + 4], turned.imag, rtol=1e-5, atol=1e-5)


def slow_norm(x: Floats, gain: Floats) -> Floats:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain


def slow_rotary(x: Floats) -> Floats:
    out = np.empty_like(x)
    half = x.shape[1] // 2
    for t in range(len(x)):
        for i in range(half):
            c, s = math.cos(t / 10000 ** (i / half)), math.sin(t / 10000 ** (i / half))
            out[t, i], out[t, i + half] = x[t, i] * c - x[t, i + half] * s, x[t, i + half] * c + x[t, i] * s
    return out


def slow_swiglu(x: Floats) -> Floats:
    value, gate = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * value


def slow_attention(q: Floats, k: Floats, v: Floats, causal: bool) -> Floats:
    out = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        scores = k @ q[t] / math.sqrt(q.shape[1])
        seen = t + 1 if causal else len(k)
        weights = np.exp(scores[:seen] - scores[:seen].max())
        out[t] = weights / weights.sum() @ v[:seen]
    return out


def slow_decoder(state: dict[str, Any], kinds: str, heads: int, dim: int, ids: list[int], latent: Floats) -> Floats:
    """Logits (T, V) of one text; `kinds` holds one letter a layer: s(elf) or c(ross)."""
    w = {name: value.double().numpy() for name, value in state.items()}
    x = w["embedding.weight"][ids]
    for number, kind in enumerate(kinds):
        layer = f"layers.{number}."
        fused = slow_norm(x, w[layer + "norm.weight"]) @ w[layer + "fused.weight"].T
        queries = np.split(fused[:, : heads * dim], heads, axis=1)
        rest = fused[:, heads * dim :]
        if kind == "s":
            k, v, rest = slow_rotary(rest[:, :dim]), rest[:, dim : 2 * dim], rest[:, 2 * dim :]
            queries = [slow_rotary(q) for q in queries]
        else:
            gain = w.get(layer + "image_norm.weight")
            image = latent if gain is None else slow_norm(latent, gain)
            k, v = np.split(image @ w[layer + "key_value.weight"].T, 2, axis=1)
        attended = np.concatenate([slow_attention(q, k, v, kind == "s") for q in queries], axis=1)
        x = x + attended @ w[layer + "attention_out.weight"].T
        if layer + "feed_forward_out.weight" in w:
            x = x + slow_swiglu(rest) @ w[layer + "feed_forward_out.weight"].T
    return slow_norm(x, w["norm.weight"]) @ w.get("head.weight", w["embedding.weight"]).T


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (SMALL, "scc"),
        (dataclasses.replace(SMALL, self_attention_in_multimodal=True, cross_attentions=1), "ssc"),
        (dataclasses.replace(SMALL, tie_embeddings=False, unimodal_layers=2), "sscc"),
        (dataclasses.replace(SMALL, feed_forward_in_multimodal=False), "scc"),
        (dataclasses.replace(SMALL, norm_image=True), "scc"),
    ],
)
def test_caption_decoder_equals_reference(config: CaptionDecoderConfig, kinds: str) -> None:
    decoder = caption_decoder(config)
    with torch.no_grad():
        decoder.embedding.weight.mul_(50)  # away from the linear range of softmax and SwiGLU
    ids, latent = torch.tensor([[1, 4, 7, 2], [1, 9, 3, 5]]), random(2, 6, 20)
    logits = decoder(ids, latent)
    for row in range(2):
        text, image = ids[row].tolist(), latent[row].double().numpy()
        expected = slow_decoder(decoder.state_dict(), kinds, config.heads, config.head_dim, text, image)
        torch.testing.assert_close(logits[row].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_caption_token_changes_no_earlier_logits() -> None:
    decoder = caption_decoder()
    latent = random(1, 6, 20)
    ids = torch.tensor([[1, 4, 7, 5, 6]])
    logits = decoder(ids, latent)
    for t in range(1, 5):
        changed = ids.clone()
        changed[0, t] = 9
        other = decoder(changed, latent)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


def test_caption_decoder_takes_the_encoder_width_by_default() -> None:
    decoder = caption_decoder(dataclasses.replace(SMALL, width=None))
    assert decoder.embedding.weight.shape == (11, 20)
    assert not any(name.endswith("bias") for name, _ in decoder.named_parameters())
    decoder(torch.tensor([[1, 2]]), random(1, 3, 20)).sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
