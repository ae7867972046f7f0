"""Views are functions of a key, and follow the distributions that the field uses."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image
from scipy import stats
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop as tv_center_crop
from torchvision.transforms.v2.functional import resize, resized_crop

from altsight.core.rng import key
from altsight.data import views
from altsight.data.decode import BrokenImage, decode
from altsight.data.views import NORMALIZATIONS, Crop, center_crop, crops, normalize, random_keep
from tests.data.conftest import Picture
from tests.data.test_decode import encode

# How an upright picture is laid down so that EXIF orientation n sets it upright again.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photograph of 640 x 427 pixels."""
    return Image.fromarray(load_sample_image("china.jpg"))


def _watch_resizing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that (height, width) of all that is resized is appended to."""
    seen: list[tuple[int, int]] = []
    real = views.F.interpolate
    monkeypatch.setattr(views.F, "interpolate", lambda x, *a, **k: seen.append(x.shape[2:]) or real(x, *a, **k))
    return seen


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
    torch.manual_seed(0)
    image, scale, ratio = torch.empty(3, height, width), list(crop.scale), list(crop.ratio)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    for of in (np.multiply, np.divide):  # area and aspect
        assert stats.ks_2samp(of(ours[:, 2], ours[:, 3]), of(theirs[:, 2], theirs[:, 3])).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_boxes_of_tiny_images_lie_inside(size: tuple[int, int]) -> None:
    for p in range(200):
        top, left, height, width = Crop((0.01, 1.0)).box(*size, key(1, p))
        assert min(top, left) >= 0
        assert min(height, width) >= 1
        assert (top + height <= size[0], left + width <= size[1]) == (True, True)


def test_every_place_is_as_likely_as_the_others() -> None:
    ninth = Crop((1 / 9, 1 / 9), (1.0, 1.0))
    boxes = [ninth.box(3, 3, key(0, p)) for p in range(900)]
    assert {box[2:] for box in boxes} == {(1, 1)}
    assert stats.chisquare([boxes.count((top, left, 1, 1)) for top in range(3) for left in range(3)]).pvalue > 1e-3


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
    crops = [whole(data, 32, key(0, p)) for p in range(1000)]
    flipped = sum(torch.equal(crop, image.flip(-1)) for crop in crops)
    assert sum(torch.equal(crop, image) for crop in crops) + flipped == 1000
    assert 450 < flipped < 550  # 500 plus or minus three standard deviations
    unflipped = Crop((1.0, 1.0), (1.0, 1.0), flip=False)
    assert all(torch.equal(unflipped(data, 32, key(0, p)), image) for p in range(20))


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "subsampling": 0, "progressive": True}])
def test_a_small_box_is_what_pillow_and_torchvision_make_of_it(photo: Image.Image, options: dict[str, Any]) -> None:
    data = encode(photo, "JPEG", **options)
    full = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    for p in range(10):
        crop, at = Crop((0.1, 0.3), flip=False), key(0, p)
        box = crop.box(*full.shape[1:], at)
        assert min(box[2:]) < 2 * 160  # decoded in full: nothing is lost at all
        expected = resized_crop(full, *box, [160, 160], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(crop(data, 160, at), expected)


@pytest.mark.parametrize(
    ("size", "reduction", "decibels"),
    [(200, 2, 33.5), (100, 4, 35), (50, 8, 35.5), (133, 2, 39), (66, 4, 40), (33, 8, 42)],
)
def test_a_reduced_view_is_close_to_that_from_all_pixels(
    photo: Image.Image, size: int, reduction: int, decibels: float
) -> None:
    """The first three are decoded hardly larger than the view (the worst case), the others half as large again.

    Here the bilinear, box and Hamming filters differ from the bicubic one by 33 to 41 decibels, and a box that is
    moved by a quarter of a pixel of the view by 31 to 33: the bounds leave room for 1 decibel and no such shift.
    """
    data = encode(photo, "JPEG", quality=90)
    crop, opened = Crop((0.9, 1.0), (1.4, 1.5), flip=False), Image.open(io.BytesIO(data))
    errors = []
    for p in range(20):
        top, left, height, width = crop.box(opened.height, opened.width, key(0, p))
        edges = (left, top, left + width, top + height)
        moved = [min(reduction * int(e / reduction + 0.5), opened.size[i % 2]) for i, e in enumerate(edges)]
        expected = np.asarray(opened.crop(moved).resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        errors.append(((crop(data, size, key(0, p)).permute(1, 2, 0).numpy() - expected) ** 2).mean())
    assert 10 * np.log10(255**2 / np.mean(errors)) > decibels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(401, 303), (402, 302), (407, 309)])
def test_boxes_are_cut_where_they_were_drawn(size: tuple[int, int], orientation: int) -> None:
    """On a ramp from edge to edge, the mean of a view tells where its centre lies, and the slope how large it is."""
    width, height = size if orientation < 5 else size[::-1]
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    upright = Image.fromarray((255 * np.stack([across, down, 0 * down], -1)).round().astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lying = upright if orientation == 1 else upright.transpose(TURNS[orientation])
    data = encode(lying, "JPEG", quality=100, subsampling=0, exif=exif)
    crop = Crop((0.1, 1.0), flip=False)
    for p in range(10):
        for pixels in (8, 60):
            box = crop.box(height, width, key(0, p))
            view = crop(data, pixels, key(0, p)).double() / 255
            reduction = next(r for r in (8, 4, 2, 1) if min(box[2:]) >= r * pixels or r == 1)
            for axis, side in ((0, height), (1, width)):
                centre, length = box[axis] + box[axis + 2] / 2, box[axis + 2]
                ramp = view[1 - axis].mean(1 - axis) * side
                # An edge moves by half a pixel of the reduced picture at most; the grey levels are side / 255 apart.
                assert abs(ramp.mean() - centre) < reduction / 2 + 0.3 * side / 255
                assert abs((ramp[-1] - ramp[0]) * pixels / (pixels - 1) - length) < 0.03 * length + reduction


def test_no_jpeg_is_decoded_smaller_than_its_view(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(3, (1000, 800), "JPEG")
    seen = _watch_resizing(monkeypatch)
    for size in (16, 33, 50, 100, 201):
        for crop in (Crop(), Crop((0.05, 0.1), (0.9, 4.0)), Crop((0.3, 1.0), (1.5, 2.0)), Crop((0.9, 1.0))):
            for p in range(5):
                drawn = crop.box(800, 1000, key(0, p))[2:]
                crop(data, size, key(0, p))
                decoded = seen.pop()
                assert min(decoded) >= min(size, *drawn)
                assert min(decoded) < 2 * size + 2 or min(drawn) < 2 * size or min(drawn) >= 16 * size


def test_a_png_is_cut_from_all_of_its_pixels(picture: Picture) -> None:
    data, crop = picture(3, (150, 130)), Crop(flip=False)
    for p in range(5):
        box = crop.box(130, 150, key(0, p))
        expected = resized_crop(decode(data), *box, [20, 20], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(crop(data, 20, key(0, p)), expected)


def test_several_views_are_decoded_once(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo, "JPEG", quality=90)
    at = key(0, 3)
    wanted = [(Crop((0.25, 1.0)), 112, at.child("a")), (Crop((0.05, 0.25)), 96, at.child("b")), (Crop(), 48, at)]
    alone = [crop(data, size, k) for crop, size, k in wanted]
    calls = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(k) or real(*a, **k))
    views = crops(data, wanted)
    assert len(calls) == 1
    assert [tuple(view.shape) for view in views] == [(3, size, size) for _, size, _ in wanted]
    assert torch.equal(views[1], alone[1])  # the most demanding
    assert all((a.float() - b.float()).abs().mean() < 5 for a, b in zip(views, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(views, crops(data, wanted), strict=True))


def test_center_crop_keeps_the_middle_of_the_shorter_side() -> None:
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[:, 10:30] = 200
    data = encode(Image.fromarray(image), "PNG")
    assert center_crop(data, 20).unique().tolist() == [200]
    assert center_crop(data, 10).shape == (3, 10, 10)
    inner = np.zeros((32, 32, 3), dtype=np.uint8)
    inner[8:24, 8:24] = 100
    assert torch.equal(
        center_crop(encode(Image.fromarray(inner), "PNG"), 16, crop_ratio=0.5),
        torch.full((3, 16, 16), 100, dtype=torch.uint8),
    )


def test_center_crop_is_torchvisions(photo: Image.Image) -> None:
    for size, crop_ratio in ((32, 1.0), (224, 0.875), (500, 0.9)):
        for image in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.crop((0, 0, 333, 417))):
            data = encode(image, "JPEG", quality=90)
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
            resized = resize(pixels, [round(size / crop_ratio)], InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(center_crop(data, size, crop_ratio), tv_center_crop(resized, [size, size]))


def test_broken_images_are_reported_as_such() -> None:
    with pytest.raises(BrokenImage):
        Crop()(b"no image", 16, key(0, 0))
    with pytest.raises(BrokenImage):
        center_crop(b"no image", 16)


def test_a_strip_that_center_crop_would_blow_up_is_refused() -> None:
    with pytest.raises(BrokenImage, match="thin"):
        center_crop(encode(Image.new("RGB", (5000, 1)), "PNG"), 224)


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
