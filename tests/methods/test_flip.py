"""FLIP's loss against loops over the formula, its masking, what its towers read, its size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import models

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.methods.base import Corpus
from altsight.methods.flip import FLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig
from altsight.train.optim import parameter_groups

TEXT = TextConfig(width=32, heads=2, layers=1, context=16, quick_gelu=False, causal=False, pool="first")
CONFIG = FLIP.Config(text=TEXT, embed_dim=24)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> FLIP:
    method = FLIP(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


def slow_loss(image: list[list[float]], text: list[list[float]], scale: float) -> float:
    """Both cross-entropies, from un-normalised features, pair by pair."""
    total = 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = []
            for v in other:
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                logits.append(scale * dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)))
            total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return total / (2 * len(image))


def test_loss_equals_reference(method: FLIP, batch: Batch) -> None:
    shared = method.embed(batch, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"image": (3, 24), "text": (3, 24)}
    expected = slow_loss(shared["image"].tolist(), shared["text"].tolist(), 1 / 0.07)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-5)


def test_hidden_patches_are_not_seen_and_visible_ones_are(method: FLIP, batch: Batch) -> None:
    image = method.embed(batch, key(0, 0)).shared["image"]
    for patch in range(16):
        changed = dataclasses.replace(batch, tensors={**batch.tensors, "image": batch["image"].clone()})
        top, left = patch // 4 * 8, patch % 4 * 8
        part = changed["image"][0, :, top : top + 8, left : left + 8]
        part.copy_(255 - part)
        other = method.embed(changed, key(0, 0)).shared["image"]
        assert torch.equal(other[0], image[0]) is (patch not in batch["keep"][0].tolist())
        assert torch.equal(other[1:], image[1:])


def test_image_is_the_projected_mean_of_all_tokens(method: FLIP, batch: Batch) -> None:
    """1 CLS token, 2 registers and the 4 visible patches."""
    tokens = method.encoder(method.encoder.normalize(batch["image"]), batch["keep"]).tokens
    assert tokens.shape == (3, 7, 32)
    expected = torch.stack([image.sum(dim=0) / 7 for image in tokens]) @ method.image_projection.weight.T
    torch.testing.assert_close(method.embed(batch, key(0, 0)).shared["image"], expected, rtol=1e-4, atol=1e-5)
    assert method.feature_point == "mean", "frozen features stay comparable"


def test_text_is_read_both_ways_at_its_first_token(method: FLIP) -> None:
    """All places count, padding included: the source has no mask for it."""
    ids = method.text.encode(["two dogs", "a red house"])
    for place in (1, 2, 15):
        other = ids.clone()
        other[:, place] = 11
        assert not torch.equal(method.text(other), method.text(ids))
    states: list[torch.Tensor] = []
    method.text.blocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    feature = method.text(ids)
    torch.testing.assert_close(feature, method.text.text_projection(method.text.ln_final(states[0][:, 0])))


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 8), (0.75, 4), (0.9, 1)])
def test_prepare(encoder: Encoder, corpus: Corpus, document: Callable[..., Document], ratio: float, kept: int) -> None:
    prepare = FLIP(dataclasses.replace(CONFIG, mask_ratio=ratio), encoder, corpus).prepare(Crop(), 32)
    first, again, other = (prepare(document(text="two dogs"), key(0, position)) for position in (5, 5, 6))
    assert first is not None and again is not None and other is not None
    keep = first["keep"].tolist()
    assert len(set(keep)) == kept and set(keep) <= set(range(16)) and keep == again["keep"].tolist()
    assert ratio == 0.9 or keep != other["keep"].tolist()
    assert torch.equal(first["image"], Crop()(document().images[0], 32, key(0, 5)))
    assert torch.equal(first["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), key(0, 5)) is None


def test_unmasked_tuning(encoder: Encoder, corpus: Corpus, batch: Batch, document: Callable[..., Document]) -> None:
    method = FLIP(dataclasses.replace(CONFIG, mask_ratio=0.0), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    example = method.prepare(Crop(), 32)(document(), key(0, 5))
    assert example is not None and set(example) == {"image", "text"}
    del batch.tensors["keep"]
    whole = method.embed_image(method.encoder(method.encoder.normalize(batch["image"])))
    assert torch.equal(method.embed(batch, key(0, 0)).shared["image"], whole)


@pytest.mark.parametrize("ratio", [-0.1, 0.97, 1.0])
def test_ratios_that_leave_nothing(encoder: Encoder, corpus: Corpus, ratio: float) -> None:
    with pytest.raises(UserError, match=r"some of the 16 patches visible.*--method\.mask-ratio"):
        FLIP(dataclasses.replace(CONFIG, mask_ratio=ratio), encoder, corpus)


def test_every_trained_parameter_gets_a_gradient(method: FLIP, batch: Batch) -> None:
    method.loss(method.embed(batch, key(0, 0)).shared)["contrastive"].backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in method.named_parameters() if p.grad is None} == {"encoder.backbone.pos_embed"}


def test_scale_stays_between_1_and_100(method: FLIP) -> None:
    for value in (9.0, -9.0):
        with torch.no_grad():
            method.logit_scale.fill_(value)
        method.after_step(Progress(0, 1))
        assert method.report()["scale"] == pytest.approx(100 if value > 0 else 1, rel=1e-5)


def test_decay_groups(method: FLIP) -> None:
    """Not biases, norms, CLS token and positions; the table of words decays."""
    method.encoder.backbone.pos_embed.requires_grad_(True)
    decayed = {id(p) for g in parameter_groups(method, FLIP.optim) if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in decayed}
    exempt = {name for name, p in method.named_parameters() if p.ndim > 1} - names
    tokens = {f"encoder.backbone.{name}" for name in ("cls_token", "reg_token", "pos_embed")}
    assert exempt == tokens | {"text.positional_embedding"}
    assert all(p.ndim > 1 for name, p in method.named_parameters() if name in names)


@pytest.mark.parametrize(
    ("model", "text", "embed_dim", "image_millions", "text_millions"),
    [
        ("vit_base_patch16_224", {}, 512, 86, 53),
        ("vit_large_patch16_224", {"width": 768, "heads": 12}, 768, 303, 109),
    ],
)
def test_towers_have_the_published_size(
    model: str, text: dict[str, int], embed_dim: int, image_millions: int, text_millions: int
) -> None:
    """Without the maps to the joint space. BERT's 30,522 word pieces and one more."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 30523)}
    wordpiece = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w3")), pad=0, start=1, end=2)
    config = FLIP.Config(embed_dim=embed_dim)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **text))
    with torch.device("meta"):
        method = FLIP(config, Encoder(EncoderConfig(model)), Corpus(wordpiece))
    image = sum(p.numel() for p in method.encoder.parameters())
    words = sum(p.numel() for name, p in method.text.named_parameters() if not name.startswith("text_projection"))
    assert (round(image / 1e6), round(words / 1e6)) == (image_millions, text_millions)
    assert method.text.context == 32 and method.text.text_projection.bias is None
    assert method.image_projection.bias is None


def test_rate_of_the_source() -> None:
    assert FLIP.optim.peak_lr(65536) == pytest.approx(1.0e-3, rel=0.03)
    assert FLIP.optim.warmup_fraction == pytest.approx(0.004)


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="flip learns from text"):
        FLIP(CONFIG, encoder, Corpus())
