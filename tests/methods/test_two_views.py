"""Two views of an image: what is drawn, and what the encoder is given."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import torch

from altsight.core.rng import key
from altsight.core.types import Document
from altsight.data.multicrop import ViewConfig
from altsight.data.photometric import Photometric, photometric
from altsight.data.views import Crop
from altsight.methods.two_views import BYOL_FIRST, BYOL_SECOND, TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from tests.methods.two_view_reference import view_batch

PLAIN = ViewConfig(colour=Photometric(jitter=0, grey=0, blur=0))


def test_views_are_two_crops_with_colours_of_their_own(document: Callable[..., Document]) -> None:
    prepare, at = TwoViews(PLAIN, BYOL_SECOND, 32), key(0, 5)
    example = pickle.loads(pickle.dumps(prepare))(document(text=None), at)
    assert example["image"].shape == (2, 3, 32, 32) and example["image"].dtype == torch.uint8
    assert example["colour"].shape == (2, 11) and example["colour"].dtype == torch.float32
    for row, name, view in ((0, "first", PLAIN), (1, "second", BYOL_SECOND)):
        assert torch.equal(example["image"][row], view.crop(document().images[0], 32, at.child(name)))
        assert torch.equal(example["colour"][row], view.colour.draw(at.child(name)))
    assert not torch.equal(example["image"][0], example["image"][1])
    again, other = prepare(document(), at), prepare(document(), key(0, 6))
    assert again is not None and other is not None
    assert torch.equal(again["image"], example["image"]) and not torch.equal(other["image"], example["image"])
    assert prepare(Document((), "empty"), at) is None


def test_the_unequal_views_of_byol() -> None:
    """Specification B4: crop (.08, 1), jitter (.4, .4, .2, .1) p .8, grey .2, blur 1 / .1, solarise 0 / .2, flip."""
    for view, blur, solarize in ((BYOL_FIRST, 1.0, 0.0), (BYOL_SECOND, 0.1, 0.2)):
        assert view.crop == Crop(scale=(0.08, 1.0), flip=True)
        assert view.colour == Photometric(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, blur, (0.1, 2.0), solarize)


def test_images_are_coloured_normalised_and_in_order(encoder: Encoder) -> None:
    batch = view_batch()
    for number, view in enumerate(view_images(encoder, batch["image"], batch["colour"])):
        expected = photometric(batch["image"][:, number], batch["colour"][:, number])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(view * std.view(3, 1, 1) + mean.view(3, 1, 1), expected, rtol=0, atol=1e-5)


def test_images_are_fp32_under_autocast(encoder: Encoder) -> None:
    batch = view_batch()
    expected = view_images(encoder, batch["image"], batch["colour"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = view_images(encoder, batch["image"], batch["colour"])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_features_are_the_mean_of_the_visible_patches(encoder: Encoder) -> None:
    encoder.init_weights(key(0, 0, "init"))
    batch = view_batch()
    images = view_images(encoder, batch["image"], batch["colour"])
    visible = torch.tensor([[0, 3, 9], [1, 2, 4], [5, 14, 15]])
    for keep, patches in ((None, 16), (visible, 3)):
        for view, found in zip(images, view_features(encoder, images, keep, "mean"), strict=True):
            tokens = encoder(view, keep).tokens
            assert tokens.shape[1] == 3 + patches  # 1 CLS, 2 registers
            torch.testing.assert_close(found, torch.stack([row[3:].sum(dim=0) / patches for row in tokens]))
