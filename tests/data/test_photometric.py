"""Colour and blur of a batch against torchvision, image by image."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as T
from torch import Tensor

from altsight.core.rng import key
from altsight.data.photometric import Photometric, photometric

SIZE = 24


def images(count: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def slow(image: Tensor, row: list[float]) -> Tensor:
    """One image through torchvision, in the order that the parameters give."""
    x = image.float() / 255
    operations = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    for place in row[4:8]:
        x = operations[int(place)](x, row[int(place)])
    if row[8]:
        x = T.rgb_to_grayscale(x, 3)
    if row[9]:
        x = T.gaussian_blur(x, [13, 13], [row[9], row[9]])
    return T.solarize(x, 128 / 255) if row[10] else x


@pytest.mark.parametrize("solarize", [0.0, 0.5])
def test_a_batch_is_what_torchvision_makes_of_each_image(solarize: float) -> None:
    config = Photometric(0.8, 0.8, 0.8, 0.2, jitter=0.8, grey=0.3, blur=0.5, sigma=(0.1, 2.0), solarize=solarize)
    x = images(24)
    parameters = torch.stack([config.draw(key(0, i)) for i in range(24)])
    got = photometric(x, parameters)
    limit = 3 * float(parameters[:, 9].max())
    assert limit <= 6, "the reference's kernel has a radius of 6"
    for i in range(24):
        want = slow(x[i], parameters[i].tolist())
        # Where torchvision's grey and ours differ in the last bit, solarising may fall on either side of one half.
        differing = ((got[i] - want).abs() > 2e-3).float().mean()
        assert differing < 0.01, (i, parameters[i])
    assert got.min() >= 0 and got.max() <= 1


def test_nothing_drawn_is_nothing_done() -> None:
    config = Photometric(jitter=0, grey=0, blur=0)
    x = images()
    out = photometric(x, torch.stack([config.draw(key(0, i)) for i in range(6)]))
    assert torch.equal(out, x.float() / 255)


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    config = Photometric(solarize=0.5, sigma=(1.9, 2.0))
    x = images()
    parameters = torch.stack([config.draw(key(3, i)) for i in range(6)])
    whole = photometric(x, parameters)
    for i in range(6):
        torch.testing.assert_close(photometric(x[i : i + 1], parameters[i : i + 1])[0], whole[i], rtol=0, atol=1e-6)


def test_probabilities_and_ranges() -> None:
    config = Photometric(0.4, 0.4, 0.2, 0.1, jitter=0.8, grey=0.2, blur=0.1, solarize=0.2)
    drawn = torch.stack([config.draw(key(0, i)) for i in range(4000)])
    jittered = drawn[:, 0] != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.03)
    assert drawn[:, 8].mean() == pytest.approx(0.2, abs=0.03)
    assert (drawn[:, 9] > 0).float().mean() == pytest.approx(0.1, abs=0.03)
    assert drawn[:, 10].mean() == pytest.approx(0.2, abs=0.03)
    for column, spread in ((0, 0.4), (1, 0.4), (2, 0.2)):
        values = drawn[jittered, column]
        assert values.min() >= 1 - spread and values.max() <= 1 + spread
        assert values.std() == pytest.approx(2 * spread / 12**0.5, rel=0.05)
    assert drawn[:, 3].abs().max() <= 0.1
    assert {tuple(row) for row in drawn[:, 4:8].tolist()} == {
        (a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4) if len({a, b, c, d}) == 4
    }
    assert torch.equal(config.draw(key(0, 5)), config.draw(key(0, 5)))


def test_a_weak_blur_does_not_depend_on_a_strong_one_beside_it() -> None:
    x = images(2)
    parameters = torch.stack([Photometric(jitter=0, grey=0, blur=0).draw(key(0, i)) for i in range(2)])
    parameters[:, 9] = torch.tensor([1.0, 2.0])
    alone, beside = photometric(x[:1], parameters[:1])[0], photometric(x, parameters)[0]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)
