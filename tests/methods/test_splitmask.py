"""SplitMask's losses against loops over the formula, its halves, what either half sees, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.masks import block_mask
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.splitmask import SplitDecoder, SplitMask
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.tokens import TokenizerConfig

CONFIG = SplitMask.Config(tokenizer=TokenizerConfig(vocabulary=40), decoder_depth=1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = ((0, 1, 2, 4, 5, 6, 9, 10), (0, 3, 5, 7, 8, 11, 13, 15), (8, 9, 10, 11, 12, 13, 14, 15))


def make(encoder: Encoder, config: SplitMask.Config = CONFIG) -> SplitMask:
    method = SplitMask(config, encoder, Corpus())
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def halved(batch: Batch) -> Batch:
    a = torch.tensor(HALVES)
    b = torch.tensor([[p for p in range(16) if p not in half] for half in HALVES])
    return dataclasses.replace(batch, tensors={"image": batch["image"], "a": a, "b": b})


def swapped(batch: Batch) -> Batch:
    return dataclasses.replace(batch, tensors={"image": batch["image"], "a": batch["b"], "b": batch["a"]})


def losses(method: SplitMask, batch: Batch) -> dict[str, Tensor]:
    """Return the three losses, the local ones divided by their counts."""
    out, counts = method.embed(batch, key(0, 0)), method.counts(batch)
    return {name: value / counts[name] for name, value in out.local.items()} | method.loss(out.shared)


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


def slow_cross_entropy(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[target]


def slow_inpainting(method: SplitMask, states: Tensor, hidden: Tensor, images: Tensor) -> float:
    """Return the mean cross-entropy over the hidden patches, from the states of all patches."""
    weight, bias = method.head.weight.double(), method.head.bias.double()
    terms = []
    for row in range(len(images)):
        for patch in hidden[row].tolist():
            scores = (weight @ states[row, patch].double() + bias).tolist()
            terms.append(slow_cross_entropy(scores, slow_word(images[row], patch, method.tokenizer.words)))
    return sum(terms) / len(terms)


def slow_matching(first: Tensor, second: Tensor, temperature: float) -> float:
    """Return InfoNCE both ways between averages over all patches (B, L, D), pair by pair."""
    a, b = ([row.double().mean(0) for row in states] for states in (first, second))
    cosine = [[float(x @ y / x.norm() / y.norm()) / temperature for y in b] for x in a]
    rows = [slow_cross_entropy(cosine[i], i) for i in range(len(a))]
    columns = [slow_cross_entropy([line[i] for line in cosine], i) for i in range(len(a))]
    return (sum(rows) + sum(columns)) / 2 / len(a)


def test_losses_equal_reference(encoder: Encoder, halved: Batch) -> None:
    method = make(encoder)
    states: list[Tensor] = []
    handle = method.decoder.register_forward_hook(lambda module, inputs, output: states.append(output.detach()))
    found = losses(method, halved)
    handle.remove()
    assert [s.shape for s in states] == [(3, 16, 32)] * 2
    expected = {
        "b_from_a": slow_inpainting(method, states[0], halved["b"], halved["image"]),
        "a_from_b": slow_inpainting(method, states[1], halved["a"], halved["image"]),
        "match": slow_matching(states[0], states[1], 0.2),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)
    assert method.weights() == dict.fromkeys(expected, 1.0)


def test_swapping_the_halves_changes_nothing(encoder: Encoder, halved: Batch) -> None:
    method = make(encoder)
    one, other = losses(method, halved), losses(method, swapped(halved))
    assert one["b_from_a"].item() != pytest.approx(one["a_from_b"].item(), rel=1e-3)
    assert other["b_from_a"].item() == pytest.approx(one["a_from_b"].item(), rel=1e-6)
    assert other["match"].item() == pytest.approx(one["match"].item(), rel=1e-6)
    assert sum(other.values()).item() == pytest.approx(sum(one.values()).item(), rel=1e-6)  # type: ignore[union-attr]


def test_a_half_gets_no_gradient_from_hidden_pixels(
    encoder: Encoder, halved: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(encoder)
    pixels = encoder.normalize(halved["image"]).requires_grad_()
    monkeypatch.setattr(encoder, "normalize", lambda images: pixels)
    local = method.embed(halved, key(0, 0)).local
    for name, seen in (("b_from_a", halved["a"]), ("a_from_b", halved["b"])):
        (gradient,) = torch.autograd.grad(local[name], pixels, retain_graph=True)
        touched = gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5)).flatten(1) > 0
        for row in range(3):
            assert touched[row].nonzero().flatten().tolist() == sorted(seen[row].tolist())


def test_the_encoder_sees_half_and_no_mask_tokens(encoder: Encoder, halved: Batch) -> None:
    method = make(encoder)
    lengths: list[int] = []
    method.encoder.register_forward_hook(lambda module, inputs, output: lengths.append(output.tokens.shape[1]))
    method.embed(halved, key(0, 0))
    assert lengths == [3 + 8, 3 + 8]


def test_decoder_puts_tokens_where_they_belong(encoder: Encoder, halved: Batch) -> None:
    """The order in which tokens come does not matter, their places do; hidden places differ by their position."""
    method = make(encoder)
    tokens, keep = torch.randn(3, 3 + 8, 32, generator=torch.Generator().manual_seed(0)), halved["a"]
    states = method.decoder(tokens, keep)
    order = torch.tensor([3, 1, 0, 7, 6, 5, 4, 2])
    mixed = torch.cat([tokens[:, :3], tokens[:, 3:][:, order]], dim=1)
    torch.testing.assert_close(method.decoder(mixed, keep[:, order]), states, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(method.decoder(mixed, keep), states, atol=1e-3)
    hidden = states[0, halved["b"][0]]
    assert torch.pdist(hidden).min() > 1e-3


def test_the_losses_start_where_chance_is(encoder: Encoder, halved: Batch) -> None:
    found = losses(make(encoder, SplitMask.Config()), halved)
    for name in ("b_from_a", "a_from_b"):
        assert found[name].item() == pytest.approx(math.log(8192), abs=0.2)
    assert found["match"].item() == pytest.approx(math.log(3), abs=0.2)


@pytest.mark.parametrize("split", ["block", "uniform"])
@pytest.mark.parametrize("size", [32, 24])
def test_halves(encoder: Encoder, document: Callable[..., Document], split: str, size: int) -> None:
    prepare = make(encoder, dataclasses.replace(CONFIG, split=split)).prepare(Crop(), size)  # type: ignore[arg-type]
    patches = (size // 8) ** 2
    seen = set()
    for i in range(30):
        example = prepare(document(text=None), key(0, i))
        assert example is not None
        a, b = example["a"].tolist(), example["b"].tolist()
        assert (len(a), len(b)) == (patches // 2, patches - patches // 2)
        assert sorted(a + b) == list(range(patches)) and a == sorted(a) and b == sorted(b)
        seen.add(tuple(a))
    assert len(seen) > 10
    assert prepare(Document((), "empty"), key(0, 0)) is None


def test_block_halves_are_in_few_pieces(encoder: Encoder, document: Callable[..., Document]) -> None:
    """Neighbours lie in the same half more often among blocks than where patches are drawn one by one."""
    with torch.device("meta"):
        large = Encoder(EncoderConfig())
    shares, free = {}, []
    for split in ("block", "uniform"):
        method = SplitMask(dataclasses.replace(CONFIG, split=split), large, Corpus())  # type: ignore[arg-type]
        prepare = dataclasses.replace(method.prepare(Crop(), 224), size=16)
        assert (prepare.grid, prepare.largest) == ((14, 14), 75)
        same = []
        for i in range(20):
            half = torch.zeros(196, dtype=torch.bool)
            half[prepare(document(), key(0, i))["a"]] = True  # type: ignore[index]
            if split == "block":
                assert torch.equal(half, block_mask((14, 14), 98, key(0, i), most=75, exact=True))
                free.append(torch.equal(half, block_mask((14, 14), 98, key(0, i), exact=True)))
            same.append((half.view(14, 14)[:, 1:] == half.view(14, 14)[:, :-1]).float().mean().item())
        shares[split] = sum(same) / len(same)
    assert shares["block"] > 0.75 and shares["uniform"] < 0.6
    assert not all(free), "blocks are bounded"


def test_two_halves_cost_no_more_than_one_whole() -> None:
    """FLOPs of ViT-B at 224 pixels: two encodings of 98 patches against BEiT's one of 196."""
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig())
        images, half = torch.empty(1, 3, 224, 224), torch.empty(1, 98, dtype=torch.int64)
        mask, token = torch.empty(1, 196, dtype=torch.bool), torch.empty(768)
    flops = []
    for call in (lambda: encoder(images, half), lambda: encoder(images, mask=mask, mask_token=token)):
        with FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
    assert 2 * flops[0] <= flops[1]


def test_weights_and_sizes(encoder: Encoder) -> None:
    config = dataclasses.replace(CONFIG, inpaint_weight=0.5, match_weight=0.0)
    assert make(encoder, config).weights() == {"b_from_a": 0.5, "a_from_b": 0.5, "match": 0.0}
    with torch.device("meta"):
        vit = Encoder(EncoderConfig())
        decoder, block = SplitDecoder(2, vit), vit.backbone.blocks[0]
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert trained == 2 * sum(p.numel() for p in block.parameters()) + 768 + 2 * 768


def test_optimizer_is_beits() -> None:
    optim = SplitMask.optim
    assert (optim.peak_lr(2048), optim.betas, optim.clip_norm) == (1.5e-3, (0.9, 0.999), 3.0)
    assert SplitMask.least_batch == 2


def test_one_patch_cannot_be_halved() -> None:
    with pytest.raises(UserError, match="halves the patches"):
        make(Encoder(EncoderConfig("vit_tiny_patch16_224", 16, 16, width=32, depth=1, heads=2)))
