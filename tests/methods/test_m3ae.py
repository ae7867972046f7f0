"""M3AE's two losses against loops over the formulas, what the joint encoding sees, masks of each sample, decay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.m3ae import M3AE
from altsight.nn.decoder import PixelDecoderConfig
from altsight.nn.encoder import Encoded, Encoder, EncoderConfig
from altsight.nn.multimodal import sincos_1d
from tests.methods.conftest import TEXTS

CONFIG = M3AE.Config(length=12, decoder=PixelDecoderConfig(width=16, depth=1, heads=2))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VISIBLE_WORDS = ((0, 3, 11), (1, 2, 5), (0, 1, 2))
"""Places of the visible words, padding among them."""


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> M3AE:
    method = M3AE(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def pairs(batch: Batch, corpus: Corpus) -> Batch:
    """Three pairs; the texts have no start and no end."""
    tokenizer = corpus.need_tokenizer("tests")
    texts = [tokenizer.model.encode(text, add_special_tokens=False).ids[:12] for text in TEXTS]
    text = torch.tensor([ids + [tokenizer.pad] * (12 - len(ids)) for ids in texts])
    assert (text[1] == tokenizer.pad).any(), "one of them ends early"
    tensors = {"image": batch["image"], "keep": batch["keep"], "text": text, "keep_text": torch.tensor(VISIBLE_WORDS)}
    return dataclasses.replace(batch, tensors=tensors)


def decoded(method: M3AE, batch: Batch, **changed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted pixels and the states of all words, with tensors of the batch replaced."""
    outputs: list[tuple[Tensor, Tensor]] = []
    handle = method.decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    method.embed(dataclasses.replace(batch, tensors={**batch.tensors, **changed}), key(0, 0))
    handle.remove()
    return outputs[0][0].detach(), outputs[0][1].detach()


def slow_pixels(pred: Tensor, batch: Batch) -> tuple[float, int]:
    """Return the summed mean squared error over masked patches, and their number; no patch is normalised."""
    total, count = 0.0, 0
    for row in range(3):
        for patch in set(range(16)) - set(batch["keep"][row].tolist()):
            top, left = patch // 4 * 8, patch % 4 * 8
            target = [
                (int(batch["image"][row, c, top + y, left + x]) / 255 - MEAN[c]) / STD[c]
                for y in range(8)
                for x in range(8)
                for c in range(3)
            ]
            total += sum((p - t) ** 2 for p, t in zip(pred[row, patch].tolist(), target, strict=True)) / len(target)
            count += 1
    return total, count


def slow_words(method: M3AE, states: Tensor, batch: Batch, pad: int) -> tuple[float, int]:
    """Return the summed cross-entropy over hidden words that are no padding, and their number."""
    weight, bias = method.decoder.words.weight.double(), method.decoder.words.bias.double()
    total, count = 0.0, 0
    for row in range(3):
        for place in range(12):
            target = int(batch["text"][row, place])
            if place not in VISIBLE_WORDS[row] and target != pad:
                scores = (weight @ states[row, place].double() + bias).tolist()
                total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
                count += 1
    return total, count


def test_losses_equal_reference(method: M3AE, corpus: Corpus, pairs: Batch) -> None:
    pixels, states = decoded(method, pairs)
    local, counts = method.embed(pairs, key(0, 0)).local, method.counts(pairs)
    for name, (total, count) in {
        "pixels": slow_pixels(pixels, pairs),
        "text": slow_words(method, states, pairs, corpus.need_tokenizer("tests").pad),
    }.items():
        assert local[name].item() == pytest.approx(total, rel=1e-5), name
        assert counts[name].item() == count, name
    assert method.weights() == {"pixels": 1.0, "text": 0.5}


def test_hidden_words_and_patches_are_not_seen(method: M3AE, pairs: Batch) -> None:
    """Each prediction depends on the visible words and patches of both modalities, and on no hidden ones."""
    before = decoded(method, pairs)
    for place in range(12):
        text = pairs["text"].clone()
        if text[0, place] == method.tokenizer.pad:
            continue
        text[0, place] = 7 if text[0, place] != 7 else 8
        for old, new in zip(before, decoded(method, pairs, text=text), strict=True):
            assert torch.equal(new[0], old[0]) is (place not in VISIBLE_WORDS[0])
            assert torch.equal(new[1:], old[1:])
    for patch in range(16):
        image = pairs["image"].clone()
        top, left = patch // 4 * 8, patch % 4 * 8
        image[0, :, top : top + 8, left : left + 8] += 100
        for old, new in zip(before, decoded(method, pairs, image=image), strict=True):
            assert torch.equal(new[0], old[0]) is (patch not in pairs["keep"][0].tolist())


def test_padding_is_never_looked_at(method: M3AE, pairs: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands for padding among the words, visible or hidden, the patches and words come out the same."""
    pixels, states = decoded(method, pairs)
    padding = pairs["text"] == method.tokenizer.pad
    assert padding[0, 11] or padding[1, 5], "a visible place holds padding"
    with torch.no_grad():
        method.text_embedding.weight[method.tokenizer.pad] += 3
        method.decoder.text_positions[0, 11] += 3
    after = decoded(method, pairs)
    assert torch.equal(after[0], pixels)
    assert torch.equal(after[1][~padding], states[~padding])
    assert not torch.equal(after[1][padding], states[padding])


def test_an_encoding_with_nothing_but_padding_is_that_of_the_image(encoder: Encoder, batch: Batch) -> None:
    encoder.init_weights(key(0, 0))
    images, extra = encoder.normalize(batch["image"]), torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    alone = encoder(images, batch["keep"])
    with_padding, _ = encoder.forward_with(images, batch["keep"], extra, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(with_padding.tokens, alone.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_padding.layers, alone.layers, rtol=1e-5, atol=1e-5)
    seen, words = encoder.forward_with(images, batch["keep"], extra, torch.zeros(3, 5, dtype=torch.bool))
    assert words.shape == (3, 5, 32) and seen.patches.shape == alone.patches.shape
    assert not torch.allclose(seen.tokens, alone.tokens, atol=1e-2)


def test_relative_positions_leave_words_aside(batch: Batch) -> None:
    """With a bias on attention between patches, the words see all patches alike, and patches each other as before."""
    config = EncoderConfig(
        "vit_tiny_patch16_224", 32, 8, width=32, depth=1, heads=2, positions="none", relative_positions=True
    )
    encoder = Encoder(config)
    encoder.init_weights(key(0, 0))
    images, extra = encoder.normalize(batch["image"]), torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    none, all_of_it = torch.zeros(3, 5, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    before = encoder.forward_with(images, batch["keep"], extra, none)
    assert encoder.relative is not None
    with torch.no_grad():
        torch.nn.init.normal_(encoder.relative.relative_position_bias_table)
    after = encoder.forward_with(images, batch["keep"], extra, none)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0].tokens, before[0].tokens, atol=1e-4)
    alone = encoder(images, batch["keep"])
    padded, _ = encoder.forward_with(images, batch["keep"], extra, all_of_it)
    torch.testing.assert_close(padded.tokens, alone.tokens, rtol=1e-5, atol=1e-5)


def test_words_have_places_and_a_type(method: M3AE, pairs: Batch) -> None:
    before = decoded(method, pairs)[0]
    for parameter in (method.text_type, method.decoder.types, method.decoder.mask_tokens):
        with torch.no_grad():
            parameter[0] += torch.linspace(0, 1, parameter.shape[-1])
        after = decoded(method, pairs)[0]
        assert not torch.allclose(after, before, atol=1e-4)
        before = after


def test_words_enter_the_encoder_with_their_place_and_type(
    method: M3AE, pairs: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Tensor] = []
    real = method.encoder.forward_with

    def spy(images: Tensor, keep: Tensor, extra: Tensor, padding: Tensor) -> tuple[Encoded, Tensor]:
        entered.append(extra.detach())
        return real(images, keep, extra, padding)

    monkeypatch.setattr(method.encoder, "forward_with", spy)
    method.embed(pairs, key(0, 0))
    for row in range(3):
        for i, place in enumerate(VISIBLE_WORDS[row]):
            angles = [place / 10000 ** (n / 16) for n in range(16)]
            position = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            word = method.text_embedding.weight[pairs["text"][row, place]]
            torch.testing.assert_close(entered[0][row, i], word + position + method.text_type[0, 0])


def test_positions_of_words() -> None:
    table = sincos_1d(8, 5)
    for place in range(5):
        angles = [place / 10000 ** (i / 4) for i in range(4)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert table[place].tolist() == pytest.approx(expected, abs=1e-6)


def test_prepare(method: M3AE, corpus: Corpus, document: Callable[..., Document]) -> None:
    prepare, tokenizer = method.prepare(Crop(), 32), corpus.need_tokenizer("tests")
    example = prepare(document(text="two dogs"), key(0, 5))
    assert example is not None
    ids = tokenizer.model.encode("two dogs", add_special_tokens=False).ids
    assert example["text"].tolist() == ids + [tokenizer.pad] * (12 - len(ids))
    assert tokenizer.end not in example["text"].tolist() and tokenizer.start not in example["text"].tolist()
    assert example["keep"].shape == (4,) and example["keep_text"].shape == (3,)
    long = prepare(document(text="two dogs " * 20), key(0, 5))
    assert long is not None and long["text"].shape == (12,)
    assert prepare(document(text=None), key(0, 5)) is None


def test_every_sample_has_masks_of_its_own(method: M3AE, document: Callable[..., Document]) -> None:
    """The released code draws one mask for a whole batch (specification A8)."""
    examples = [method.prepare(Crop(), 32)(document(), key(0, i)) for i in range(20)]
    for name in ("keep", "keep_text"):
        assert len({tuple(e[name].tolist()) for e in examples if e is not None}) > 10


def test_weights_at_the_start_and_decay(method: M3AE) -> None:
    assert method.text_embedding.weight.std().item() == pytest.approx(1, abs=0.05)
    assert method.no_weight_decay() == {
        "text_embedding.weight",
        "text_type",
        "decoder.mask_tokens",
        "decoder.types",
        "encoder.backbone.cls_token",
        "encoder.backbone.pos_embed",
        "encoder.backbone.reg_token",
    }


def test_reconstruction_keeps_visible_patches(method: M3AE, pairs: Batch) -> None:
    out, original = method.train().reconstruct(pairs), pairs["image"].float() / 255
    assert out.shape == (3, 3, 32, 32) and out.min() >= 0 and out.max() <= 1 and method.training
    for patch in range(16):
        area = (0, slice(None), slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8))
        assert torch.allclose(out[area], original[area], atol=1e-5) is (patch in pairs["keep"][0].tolist())


def test_settings_of_the_source(corpus: Corpus) -> None:
    """64 words of which 16 stay visible; a decoder of 8 layers, 512 wide; the rate of MAE (specification A8)."""
    with torch.device("meta"):
        method = M3AE(M3AE.Config(), Encoder(EncoderConfig(img_size=256)), corpus)
    prepare = method.prepare(Crop(), 256)
    assert (prepare.length, prepare.mask_ratio, prepare.masked.patches) == (64, 0.75, 256)
    assert (len(method.decoder.blocks), method.decoder.types.shape) == (8, (2, 512))
    assert M3AE.optim.peak_lr(4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize(("field", "what"), [("mask_ratio", "16 patches"), ("text_mask_ratio", "12 words")])
@pytest.mark.parametrize("ratio", [0.0, 0.97])
def test_ratio_that_leaves_nothing(encoder: Encoder, corpus: Corpus, field: str, what: str, ratio: float) -> None:
    with pytest.raises(UserError, match=f"mask ratio of {ratio:g} must leave some of the {what}"):
        M3AE(dataclasses.replace(CONFIG, **{field: ratio}), encoder, corpus)  # type: ignore[arg-type]


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="m3ae learns from text"):
        M3AE(CONFIG, encoder, Corpus())
