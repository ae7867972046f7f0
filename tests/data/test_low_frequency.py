"""The crop of the spectrum: identities that hold for the low-pass filter and for no resize (specification 3.9)."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.rng import key, torch_seeded
from altsight.data.views import low_frequency_crop
from altsight.nn.encoder import Encoder, EncoderConfig

FULL, SMALL = 32, 16


def noise(*shape: int) -> Tensor:
    with torch_seeded(key(0, 0, "low frequency")):
        return torch.randn(*shape)


def wave(down: float, right: float, phase: float = 0.3) -> Tensor:
    """Return cos(2 pi (down * y + right * x) / FULL + phase) as an image (1, 1, FULL, FULL)."""
    y, x = torch.meshgrid(torch.arange(FULL), torch.arange(FULL), indexing="ij")
    return torch.cos(2 * math.pi * (down * y + right * x) / FULL + phase)[None, None]


def slow_crop(image: Tensor, size: int) -> Tensor:
    """Return the crop of a small image (H, H) by the sums of the two Fourier transforms, term by term."""
    full = len(image)
    band = range(-size // 2, size // 2)
    spectrum = {}
    for k in band:
        for q in band:
            spectrum[k, q] = sum(
                image[y, x].item() * cmath.exp(-2j * math.pi * (k * y + q * x) / full)
                for y in range(full)
                for x in range(full)
            )
    out = torch.zeros(size, size)
    for y in range(size):
        for x in range(size):
            value = sum(c * cmath.exp(2j * math.pi * (k * y + q * x) / size) for (k, q), c in spectrum.items())
            out[y, x] = value.real / size**2 * (size / full) ** 2
    return out


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_equals_the_slow_reference(size: int) -> None:
    image = noise(8, 8)
    assert torch.allclose(low_frequency_crop(image[None, None], size)[0, 0], slow_crop(image, size), atol=1e-5)


def test_at_full_size_it_changes_nothing() -> None:
    images = noise(2, 3, FULL, FULL)
    assert torch.allclose(low_frequency_crop(images, FULL), images, atol=3e-6)


def test_a_constant_stays_and_so_does_every_mean() -> None:
    assert torch.allclose(low_frequency_crop(torch.full((1, 3, FULL, FULL), 0.7), SMALL), torch.tensor(0.7), atol=1e-6)
    images = noise(2, 3, FULL, FULL)
    small = low_frequency_crop(images, SMALL)
    assert small.shape == (2, 3, SMALL, SMALL) and small.dtype == torch.float32
    assert torch.allclose(small.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-7)


@pytest.mark.parametrize("band", [(3, 5), (7, 0), (0, 7), (-7, 7), (1, -6)])
def test_what_is_below_the_band_is_decimated(band: tuple[int, int]) -> None:
    image = wave(*band) + 0.5 * wave(2, 1)
    assert torch.allclose(low_frequency_crop(image, SMALL), image[..., ::2, ::2], atol=3e-5)


@pytest.mark.parametrize("band", [(9, 0), (0, 12), (15, 3), (-10, 2)])
def test_what_is_above_the_band_vanishes_and_a_resize_keeps_some(band: tuple[int, int]) -> None:
    image = wave(*band)
    assert low_frequency_crop(image, SMALL).abs().max() < 3e-5
    if band == (9, 0):
        for antialias in (False, True):
            resized = F.interpolate(image, (SMALL, SMALL), mode="bilinear", antialias=antialias)
            assert resized.abs().max() > 0.1


def test_of_the_band_s_edge_the_negative_frequency_is_kept() -> None:
    """cos at size / 2 is half of +size/2, which is dropped, and half of -size/2, which is kept."""
    image = wave(SMALL // 2, 0, phase=0.0)
    expected = 0.5 * (-1.0) ** torch.arange(SMALL)
    assert torch.allclose(low_frequency_crop(image, SMALL)[0, 0, :, 0], expected, atol=3e-5)


def test_images_that_differ_above_the_band_give_the_same_crop() -> None:
    image = noise(1, 1, FULL, FULL)
    other = image + 3 * wave(11, 2) - 2 * wave(0, 14)
    assert torch.allclose(low_frequency_crop(image, SMALL), low_frequency_crop(other, SMALL), atol=3e-5)


def test_the_encoder_crops_what_has_its_full_size_after_normalising() -> None:
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=FULL, patch_size=8, width=48, depth=1, heads=3))
    images = (noise(2, 3, FULL, FULL).sigmoid() * 255).to(torch.uint8)
    whole = encoder.normalize(images)
    encoder.input_size = SMALL
    assert torch.equal(encoder.normalize(images), low_frequency_crop(whole, SMALL))
    local = images[..., :24, :24]
    assert encoder.normalize(local).shape[-1] == 24
    assert encoder(encoder.normalize(images)).patches.shape[1] == encoder.patches_at(SMALL) == 4
