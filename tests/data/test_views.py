"""Views are functions of a key, and follow the distributions that the field uses."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image
from scipy import stats

from altsight.core.rng import key
from altsight.data import views
from altsight.data.decode import BrokenImage, decode
from altsight.data.views import NORMALIZATIONS, Crop, center_crop, normalize, random_keep
from tests.data.conftest import Picture


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((96, 128), Crop()),
        ((300, 40), Crop((0.08, 1.0))),  # hardly any box fits: the fallback to the centre
        ((40, 300), Crop((0.5, 1.0), (0.5, 2.0))),
        ((200, 200), Crop((0.05, 0.15), (0.4, 4.0))),
    ],
)
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], crop: Crop) -> None:
    n = 1500
    height, width = size
    ours = np.array([crop.box(height, width, key(0, p)) for p in range(n)])
    theirs_of = T.RandomResizedCrop(1, crop.scale, crop.ratio)
    torch.manual_seed(0)
    drawn = [theirs_of.make_params([torch.empty(3, height, width)]) for _ in range(n)]
    theirs = np.array([[d[side] for side in ("top", "left", "height", "width")] for d in drawn])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_boxes_of_tiny_images_lie_inside(size: tuple[int, int]) -> None:
    for p in range(200):
        top, left, height, width = Crop((0.01, 1.0)).box(*size, key(1, p))
        assert min(top, left) >= 0
        assert min(height, width) >= 1
        assert (top + height <= size[0], left + width <= size[1]) == (True, True)


def test_a_crop_is_a_function_of_its_key(picture: Picture) -> None:
    data = picture(1, (60, 40), "JPEG")
    first = Crop()(data, 16, key(0, 5))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, Crop()(data, 16, key(0, 5)))
    assert not torch.equal(first, Crop()(data, 16, key(0, 6)))
    assert not torch.equal(first, Crop()(data, 16, key(1, 5)))


def test_the_whole_image_half_of_the_time_flipped(picture: Picture) -> None:
    data = picture(2, (32, 32))
    image = decode(data)
    whole = Crop((1.0, 1.0), (1.0, 1.0))
    crops = [whole(data, 32, key(0, p)) for p in range(200)]
    flipped = sum(torch.equal(crop, image.flip(-1)) for crop in crops)
    assert sum(torch.equal(crop, image) for crop in crops) + flipped == 200
    assert 65 < flipped < 135  # 100 plus or minus five standard deviations
    unflipped = Crop((1.0, 1.0), (1.0, 1.0), flip=False)
    assert all(torch.equal(unflipped(data, 32, key(0, p)), image) for p in range(20))


@pytest.mark.parametrize("crop", [Crop(), Crop((0.05, 0.1), (0.9, 4.0)), Crop((0.3, 1.0), (1.5, 2.0))])
def test_no_crop_is_enlarged_from_a_jpeg_decoded_too_small(
    crop: Crop, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = picture(3, (2000, 1800), "JPEG")
    asked = []

    def remember(data: bytes, least: int) -> torch.Tensor:
        asked.append(least)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(views, "decode", remember)
    crop(data, 40, key(0, 0))
    monkeypatch.undo()
    height, width = decode(data, asked[0]).shape[1:]
    assert height < 1800
    assert min(min(crop.box(height, width, key(0, p))[2:]) for p in range(500)) >= 39  # rounded from 40 or more


def test_center_crop_keeps_the_middle_of_the_shorter_side() -> None:
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[:, 10:30] = 200
    data = _png(image)
    assert center_crop(data, 20).unique().tolist() == [200]
    assert center_crop(data, 10).shape == (3, 10, 10)
    inner = np.zeros((32, 32, 3), dtype=np.uint8)
    inner[8:24, 8:24] = 100
    assert torch.equal(center_crop(_png(inner), 16, crop_ratio=0.5), torch.full((3, 16, 16), 100, dtype=torch.uint8))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_broken_images_are_reported_as_such() -> None:
    with pytest.raises(BrokenImage):
        Crop()(b"no image", 16, key(0, 0))
    with pytest.raises(BrokenImage):
        center_crop(b"no image", 16)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (16, 0.0, 16), (10, 0.99, 0), (9, 0.5, 4)])
def test_keep_counts_as_mae(patches: int, ratio: float, kept: int) -> None:
    keep = random_keep(patches, ratio, key(0, 0))
    assert keep.dtype == torch.int64
    assert len(keep) == kept
    assert keep.tolist() == sorted(set(keep.tolist()) & set(range(patches)))


def test_keep_is_uniform_over_patches_and_pairs() -> None:
    n = 2000
    visible = np.zeros((n, 12))
    for p in range(n):
        visible[p, random_keep(12, 0.5, key(0, p)).numpy()] = 1
    deviation = np.sqrt(n * 0.25)
    assert np.abs(visible.sum(0) - n / 2).max() < 5 * deviation
    together = visible.T @ visible
    pairs = together[np.triu_indices(12, 1)]
    expected = n * 0.5 * 5 / 11
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected)


def test_the_purposes_of_one_sample_are_independent() -> None:
    flips = np.array([key(0, p).child("flip").generator().random() for p in range(500)])
    lefts = np.array([Crop((0.3, 0.3)).box(100, 100, key(0, p))[1] for p in range(500)])
    assert abs(np.corrcoef(flips, lefts)[0, 1]) < 0.18  # four standard deviations


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
def test_normalize_from_the_formula(name: str) -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = NORMALIZATIONS[name]
    out = normalize(images, name)
    assert out.dtype == torch.float32
    for c in range(3):
        expected = (images[:, c].numpy() / 255.0 - mean[c]) / std[c]
        np.testing.assert_allclose(out[:, c].numpy(), expected, atol=1e-6)
