"""BEiT's loss against loops over the formula, masks of any number of patches, what the encoder sees, its settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.beit import BEiT
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.tokens import TokenizerConfig

CONFIG = BEiT.Config(tokenizer=TokenizerConfig(vocabulary=40))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASKED = ((1, 2, 5, 6, 9, 10), (4, 8), ())
"""Masked patches of three images: as many as there can be, fewer, none."""


def make(encoder: Encoder, config: BEiT.Config = CONFIG) -> BEiT:
    method = BEiT(config, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def masked(batch: Batch) -> Batch:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, patches in enumerate(MASKED):
        mask[row, list(patches)] = True
    return dataclasses.replace(batch, tensors={"image": batch["image"], "mask": mask})


def slow_word(image: Tensor, patch: int, words: Tensor) -> int:
    """Return the word of highest cosine to the pixels of one patch, normalised by ImageNet's mean and deviation."""
    top, left = patch // 4 * 8, patch % 4 * 8
    pixels = [
        (int(image[c, top + y, left + x]) / 255 - MEAN[c]) / STD[c]
        for c in range(3)
        for y in range(8)
        for x in range(8)
    ]
    products = [sum(p * w for p, w in zip(pixels, word, strict=True)) for word in words.tolist()]
    lengths = [math.sqrt(sum(w * w for w in word)) for word in words.tolist()]
    return max(range(len(products)), key=lambda v: products[v] / lengths[v])


def slow_loss_sum(method: BEiT, patches: Tensor, batch: Batch) -> float:
    """Return the cross-entropy summed over masked patches, one after the other, from the encoder's output."""
    weight, bias = method.head.weight.double(), method.head.bias.double()
    total = 0.0
    for row, chosen in enumerate(MASKED):
        for patch in chosen:
            scores = (weight @ patches[row, patch].double() + bias).tolist()
            target = slow_word(batch["image"][row], patch, method.tokenizer.words)
            total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
    return total


def caught(method: BEiT, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Return the local losses, and the patch tokens that came out of the encoder."""
    outputs: list[Tensor] = []
    handle = method.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output.patches))
    local = method.embed(batch, key(0, 0)).local
    handle.remove()
    return local, outputs[0].detach()


def test_loss_equals_reference(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    local, patches = caught(method, masked)
    assert local["tokens"].item() == pytest.approx(slow_loss_sum(method, patches, masked), rel=1e-5)
    assert method.counts(masked)["tokens"].item() == 8


def test_an_image_without_a_masked_patch_changes_nothing(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    assert torch.allclose(
        method.embed(masked, key(0, 0)).local["tokens"], caught(method, masked.part(0, 2))[0]["tokens"]
    )
    nothing = method.embed(masked.part(2, 3), key(0, 0)).local["tokens"]
    nothing.backward()  # type: ignore[no-untyped-call]
    assert nothing.item() == 0 and method.head.weight.grad is not None and not method.head.weight.grad.any()


def test_the_encoder_sees_mask_tokens_instead_of_masked_patches(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    _, before = caught(method, masked)
    for patch in range(16):
        image = masked["image"].clone()
        top, left = patch // 4 * 8, patch % 4 * 8
        image[0, :, top : top + 8, left : left + 8] += 100
        tensors = {**masked.tensors, "image": image}
        _, after = caught(method, dataclasses.replace(masked, tensors=tensors))
        assert torch.equal(after[0], before[0]) is (patch in MASKED[0])
    with torch.no_grad():
        method.mask_token += 1
    _, after = caught(method, masked)
    assert not torch.allclose(after[:2], before[:2]) and torch.equal(after[2], before[2])


def test_targets_are_of_the_pixels_not_of_what_the_encoder_normalises_by(batch: Batch, masked: Batch) -> None:
    """Under another normalisation of the encoder's input, the words stay the same."""
    used = []
    for name in ("imagenet", "half"):
        config = EncoderConfig("vit_tiny_patch16_224", 32, 8, width=32, depth=1, heads=2, normalization=name)
        method = make(Encoder(config))
        method.embed(masked, key(0, 0))
        used.append(method.report())
    assert used[0] == used[1]


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder, BEiT.Config())
    loss = method.embed(masked, key(0, 0)).local["tokens"] / method.counts(masked)["tokens"]
    assert loss.item() == pytest.approx(math.log(8192), abs=0.1)


def test_report_is_of_the_words_of_the_last_batch(encoder: Encoder, masked: Batch) -> None:
    method = make(encoder)
    assert method.report() == {}
    method.embed(masked, key(0, 0))
    words = [slow_word(image, patch, method.tokenizer.words) for image in masked["image"] for patch in range(16)]
    shares = [words.count(word) / 48 for word in set(words)]
    assert method.report()["top_word"] == pytest.approx(max(shares))
    assert method.report()["word_bits"] == pytest.approx(-sum(s * math.log2(s) for s in shares), rel=1e-5)


def test_prepare(encoder: Encoder, document: Callable[..., Document]) -> None:
    prepare, at = make(encoder).prepare(Crop(), 32), key(0, 5)
    example = prepare(document(text=None), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert example["mask"].shape == (16,) and example["mask"].dtype == torch.bool
    counts = [int(prepare(document(), key(0, i))["mask"].sum()) for i in range(20)]  # type: ignore[index]
    assert max(counts) == 6, "75 of 196, scaled to 16"
    assert prepare(Document((), "empty"), at) is None


def test_prepare_at_another_size(encoder: Encoder, document: Callable[..., Document]) -> None:
    """A curriculum asks for smaller images: the mask is of their patches, and the loss takes it."""
    method = make(encoder)
    example = method.prepare(Crop(), 24)(document(), key(0, 5))
    assert example is not None and example["mask"].shape == (9,) and 0 < example["mask"].sum() <= 3
    batch = Batch({n: t[None] for n, t in example.items()}, torch.arange(1), torch.arange(1))
    assert method.embed(batch, key(0, 0)).local["tokens"] > 0


def test_masks_at_the_papers_size(document: Callable[..., Document]) -> None:
    with torch.device("meta"):
        method = BEiT(BEiT.Config(), Encoder(EncoderConfig()), Corpus())
    prepare = method.prepare(Crop(), 224)
    assert (prepare.grid, prepare.count, prepare.least, prepare.aspect) == ((14, 14), 75, 16, 0.3)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("all", method), ("encoder", method.encoder))}
    assert sizes["all"] - sizes["encoder"] == 768 + 768 * 8192 + 8192


def test_missing_codebook_is_missed_before_the_first_step(encoder: Encoder, tmp_path: Path) -> None:
    config = BEiT.Config(TokenizerConfig(str(tmp_path / "words.safetensors"), vocabulary=40))
    method = make(encoder, config)
    with pytest.raises(UserError, match="does not exist"):
        method.prepare(Crop(), 32)


def test_weights_are_cut_off_at_one_deviation() -> None:
    """BEiT's "trunc-normal .02" keeps nothing further out than 0.02, which leaves a deviation of 0.0108."""
    method = make(Encoder(EncoderConfig("vit_tiny_patch16_224", 32, 8, init="beit")), BEiT.Config())
    for weight in (method.head.weight, method.encoder.backbone.blocks[0].attn.qkv.weight):
        assert weight.abs().max() <= 0.02 and float(weight.detach().std()) == pytest.approx(0.0108, abs=2e-4)


def test_optimizer_and_decay(encoder: Encoder) -> None:
    """Specification B2 and E1: an absolute rate, clipping at 3, and decay for all that is not one-dimensional."""
    assert BEiT.optim.peak_lr(2048) == BEiT.optim.peak_lr(64) == 1.5e-3
    assert (BEiT.optim.betas, BEiT.optim.clip_norm, BEiT.optim.min_lr) == ((0.9, 0.999), 3.0, 1e-5)
    method = make(encoder)
    assert method.no_weight_decay() == set() and method.mask_token.ndim > 1
