"""MUG: what its caption decoder sees, both losses against references, and captions that it has learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.text import Tokenizer
from altsight.data.views import Crop, random_keep
from altsight.methods.base import Corpus
from altsight.methods.mae import MAE
from altsight.methods.mug import MUG
from altsight.nn.decoder import CaptionDecoderConfig, PixelDecoderConfig
from altsight.nn.decoding import BEAM
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator, Embed
from tests.methods.conftest import TEXTS

CONFIG = MUG.Config(
    decoder=PixelDecoderConfig(width=16, depth=1, heads=2),
    captions=CaptionDecoderConfig(unimodal_layers=1, multimodal_layers=1, heads=2, head_dim=16, ff_mult=2, length=16),
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> MUG:
    method = MUG(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def caption_logits(method: MUG, batch: Batch, image: Tensor | None = None) -> Tensor:
    """The logits inside of `embed`, with the images replaced if given."""
    caught: list[Tensor] = []
    handle = method.captions.register_forward_hook(lambda module, inputs, output: caught.append(output.detach()))
    tensors = batch.tensors if image is None else {**batch.tensors, "image": image}
    method.embed(dataclasses.replace(batch, tensors=tensors), key(0, 0))
    handle.remove()
    return caught[0]


def test_caption_sees_the_visible_patches_and_no_others(method: MUG, batch: Batch) -> None:
    logits = caption_logits(method, batch)
    for patch in range(16):
        top, left = patch // 4 * 8, patch % 4 * 8
        image = batch["image"].clone()
        image[0, :, top : top + 8, left : left + 8] += 100
        changed = caption_logits(method, batch, image)
        assert torch.equal(changed[0], logits[0]) is (patch not in batch["keep"][0].tolist())
        assert torch.equal(changed[1:], logits[1:])


def test_one_forward_of_the_encoder_feeds_both_decoders(method: MUG, batch: Batch) -> None:
    latents: list[Tensor] = []
    calls: list[int] = []
    method.encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    method.captions.register_forward_hook(lambda module, inputs, output: latents.append(inputs[1]))
    method.pixels.decoder.register_forward_hook(lambda module, inputs, output: latents.append(inputs[0]))
    method.embed(batch, key(0, 0))
    assert len(calls) == 1
    assert latents[0] is latents[1]
    assert latents[0].shape == (3, 1 + 2 + 4, 32)  # CLS, registers, a quarter of 16 patches


def test_caption_sees_the_class_token_and_49_patches_of_196(corpus: Corpus, batch: Batch) -> None:
    """At the source's size and mask ratio (specification PART 3)."""
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", width=32, depth=1, heads=2))
    method = MUG(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    contexts: list[Tensor] = []
    method.captions.register_forward_hook(lambda module, inputs, output: contexts.append(inputs[1]))
    tensors = {
        "image": torch.zeros(3, 3, 224, 224, dtype=torch.uint8),
        "keep": torch.stack([random_keep(196, method.config.mask_ratio, key(0, i)) for i in range(3)]),
        "text": batch["text"],
    }
    method.embed(dataclasses.replace(batch, tensors=tensors), key(0, 0))
    assert contexts[0].shape == (3, 1 + 49, 32)


def test_a_token_changes_no_earlier_logits(method: MUG, batch: Batch) -> None:
    logits = caption_logits(method, batch)
    for t in range(1, 8):
        text = batch["text"].clone()
        text[:, t] = (text[:, t] + 5) % 290
        other = caption_logits(method, dataclasses.replace(batch, tensors={**batch.tensors, "text": text}))
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


def slow_caption_sum(logits: Tensor, ids: Tensor, pad: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            target = int(ids[row, t + 1])
            if target != pad:
                scores = logits[row, t].double().tolist()
                total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
                count += 1
    return total, count


def test_losses_equal_reference(method: MUG, corpus: Corpus, batch: Batch) -> None:
    local, counts = method.embed(batch, key(0, 0)).local, method.counts(batch)
    logits, pad = caption_logits(method, batch), corpus.need_tokenizer("tests").pad
    total, count = slow_caption_sum(logits, batch["text"], pad)
    assert local["caption"].item() == pytest.approx(total, rel=1e-5)
    assert {name: n.item() for name, n in counts.items()} == {"pixels": 3 * 12, "caption": count}
    assert method.weights() == {"pixels": 1.0, "caption": 0.1}


def test_the_loss_is_the_weighted_sum(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    """Of the mean over masked patches and the mean over caption tokens; compared by its gradient."""
    method = MUG(dataclasses.replace(CONFIG, recon_weight=0.7, caption_weight=0.3), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    local, counts = method.embed(batch, key(0, 0)).local, method.counts(batch)
    total = 0.7 * local["pixels"] / counts["pixels"] + 0.3 * local["caption"] / counts["caption"]
    total.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    losses, _ = Accumulator(method, Embed(method), seed=0)(batch)
    assert sum(method.weights()[name] * value.item() for name, value in losses.items()) == pytest.approx(total.item())
    for name, p in method.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])


def test_pixel_branch_is_maes(method: MUG, corpus: Corpus, batch: Batch) -> None:
    mae = MAE(MAE.Config(decoder=CONFIG.decoder), method.encoder, corpus)
    mae.init_weights(key(0, 0, "init"))
    assert torch.equal(mae.embed(batch, key(0, 0)).local["pixels"], method.embed(batch, key(0, 0)).local["pixels"])
    assert torch.equal(mae.reconstruct(batch), method.reconstruct(batch))


def test_every_trained_parameter_gets_a_gradient(method: MUG, batch: Batch) -> None:
    torch.stack(list(method.embed(batch, key(0, 0)).local.values())).sum().backward()  # type: ignore[no-untyped-call]
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == {"encoder.backbone.pos_embed", "pixels.decoder.positions"}


def test_learned_captions_come_out_again(method: MUG, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        method.embed(batch, key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    method.train()
    assert method.caption(batch["image"], batch["keep"], prefix="") == list(TEXTS)
    assert method.caption(batch["image"], batch["keep"], prefix="", decoding=BEAM) == list(TEXTS)
    assert method.caption(batch["image"][:1], batch["keep"][:1], prefix="a") == [TEXTS[0]]
    assert method.training


def test_caption_is_never_longer_than_asked(method: MUG, corpus: Corpus, batch: Batch) -> None:
    tokenizer = corpus.need_tokenizer("tests")
    for caption in method.caption(batch["image"], max_length=5):
        assert caption.startswith("a")
        # Ids that are no whole character come back as a replacement character, which is longer again.
        assert len(tokenizer.model.encode(caption.replace("\ufffd", "")).ids) <= 4


def test_prepare(method: MUG, encoder: Encoder, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    mae = MAE(MAE.Config(decoder=CONFIG.decoder), encoder, corpus).prepare(Crop(), 32)(document(), at)
    assert example is not None and mae is not None
    assert torch.equal(example["image"], mae["image"]) and torch.equal(example["keep"], mae["keep"])
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="mug learns from text"):
        MUG(CONFIG, encoder, Corpus())


@pytest.mark.parametrize(
    ("model", "millions"),
    [("vit_small_patch16_224", (21.6, 25.6, 55.1)), ("vit_large_patch16_224", (303.1, 26.2, 288.4))],
)
@pytest.mark.parametrize("width", [None, 768])
def test_sizes_s_and_l(model: str, millions: tuple[float, float, float], width: int | None) -> None:
    """S is 384/12/6, L 1024/24/16. The text decoder is as wide as the encoder, or maps its tokens to its own width."""
    vocabulary = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102} | {f"w{i}": i for i in range(30522) if i not in (0, 101, 102)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w1")), pad=0, start=101, end=102)
    config = MUG.Config(captions=CaptionDecoderConfig(width=width, heads=12))
    with torch.device("meta"):
        method = MUG(config, Encoder(EncoderConfig(model)), Corpus(tokenizer))
    latent = method.encoder.width
    text = width or latent

    def layer(reads: int) -> int:
        """Norm, fused queries and SwiGLU, two maps out; one key and one value head from what it reads."""
        return text + text * (12 * 64 + 8 * text) + 2 * 64 * reads + 12 * 64 * text + 4 * text * text

    captions = 30522 * text + 6 * layer(text) + 12 * layer(latent) + text
    assert sum(p.numel() for p in method.captions.parameters()) == captions
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (method.encoder, method.pixels)]
    assert sizes == pytest.approx(millions[:2], abs=0.5)
    if width is None:
        assert captions / 1e6 == pytest.approx(millions[2], abs=0.1)


def test_horizontal_flips_are_the_crops_option(method: MUG, document: Callable[..., Document]) -> None:
    """MAE's default, kept with captions; --data.crop.flip False switches it off."""
    crop, straight = Crop(scale=(1.0, 1.0)), Crop(scale=(1.0, 1.0), flip=False)
    mirrored = []
    for position in range(8):
        at = key(0, position)
        first, second = (method.prepare(c, 32)(document(), at) for c in (crop, straight))
        assert first is not None and second is not None
        mirrored.append(not torch.equal(first["image"], second["image"]))
        assert torch.equal(first["image"], second["image"].flip(-1) if mirrored[-1] else second["image"])
        assert torch.equal(first["text"], second["text"])
    assert len(set(mirrored)) == 2
