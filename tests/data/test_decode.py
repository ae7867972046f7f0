"""Decoding: right pixels for every kind of file that the web holds, `BrokenImage` for what is none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from altsight.data.decode import BrokenImage, decode, open_picture
from tests.data.conftest import Picture

# Pillow warns of the damaged EXIF blocks in here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {})]
)
def test_lossless_formats_are_exact(picture: Picture, file_format: str, options: dict[str, Any]) -> None:
    data = picture(1, (21, 13), file_format, **options)
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 13, 21)
    assert torch.equal(image, pixels(opened(data)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_agrees_with_pillow(picture: Picture, options: dict[str, Any]) -> None:
    data = picture(2, (61, 47), "JPEG", **options)
    assert difference(decode(data), pixels(opened(data))) < 1.0


def test_grey_jpeg_becomes_rgb() -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
    image = decode(encode(Image.fromarray(ramp), "JPEG", quality=95))
    assert image.shape == (3, 16, 24)
    assert torch.equal(image[0], image[1])
    assert difference(image[0], torch.from_numpy(ramp)) < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_jpeg_is_the_full_one_made_smaller(picture: Picture, reduction: int, options: dict[str, Any]) -> None:
    data = picture(3, (320, 240), "JPEG", quality=95, **options)
    reduced = open_picture(data).pixels(reduction)
    shape = (240 // reduction, 320 // reduction)
    assert reduced.shape[1:] == shape
    full = opened(data).convert("RGB").resize(shape[::-1], Image.Resampling.BOX)
    assert difference(reduced, pixels(full)) < 1.0


@pytest.mark.parametrize("size", [(320, 240), (97, 101), (9, 2), (1, 1), (1, 700)])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduced_sides_are_rounded_up(picture: Picture, size: tuple[int, int], reduction: int) -> None:
    opened_picture = open_picture(picture(4, size, "JPEG"))
    assert (opened_picture.width, opened_picture.height) == size
    height, width = opened_picture.pixels(reduction).shape[1:]
    assert (width, height) == (-(-size[0] // reduction), -(-size[1] // reduction))


def test_the_reduction_is_the_strongest_below_the_ratio(picture: Picture) -> None:
    jpeg, png = (open_picture(picture(4, (32, 32), kind)) for kind in ("JPEG", "PNG"))
    ratios = (0.1, 1, 1.99, 2, 3.99, 4, 7.99, 8, 1000)
    assert [jpeg.reduction(ratio) for ratio in ratios] == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    assert {png.reduction(ratio) for ratio in ratios} == {1}


def test_a_slightly_damaged_jpeg_is_reduced_too(picture: Picture) -> None:
    data = picture(8, (80, 40), "JPEG")
    damaged = open_picture(data[:-2] + b"\0\0\0" + data[-2:])
    for reduction in (1, 2, 4, 8):
        assert difference(damaged.pixels(reduction), open_picture(data).pixels(reduction)) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(picture: Picture, file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    quality = {"quality": 95} if file_format == "JPEG" else {"lossless": True}
    data = picture(5, (40, 24), file_format, exif=exif, **quality)
    expected = pixels(ImageOps.exif_transpose(opened(data)))
    image = decode(data)
    assert image.shape[1:] == ((24, 40) if orientation < 5 else (40, 24))
    assert difference(image, expected) < 1.0


def test_a_rotated_jpeg_is_upright_at_every_scale(picture: Picture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rotated = open_picture(picture(5, (320, 240), "JPEG", exif=exif))
    assert (rotated.height, rotated.width) == (320, 240)
    reduced, full = rotated.pixels(4), pixels(ImageOps.exif_transpose(opened(picture(5, (320, 240), exif=exif))))
    assert difference(reduced, F.avg_pool2d(full.float(), 4)) < 2


def test_damaged_exif_does_not_lose_the_picture(picture: Picture) -> None:
    plain, with_exif = (
        picture(6, (32, 32), "JPEG", exif=exif) for exif in (b"", b"Exif\0\0II*\0\xff\xff\xff\xff\1\2\3")
    )
    assert torch.equal(decode(with_exif), decode(plain))


def test_transparency_is_laid_on_white() -> None:
    colours = np.zeros((4, 6, 4), dtype=np.uint8)
    colours[..., 0] = 200
    colours[:, 3:, 3] = 255
    image = Image.fromarray(colours)
    expected = torch.full((3, 4, 6), 255, dtype=torch.uint8)
    expected[:, :, 3:] = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True)):
        assert torch.equal(decode(data), expected)


def test_palette_and_grey_with_a_transparent_colour() -> None:
    index = np.array([[0, 1, 2]], dtype=np.uint8)
    palette = Image.fromarray(index).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image = decode(encode(palette, "PNG", transparency=1))
    assert image[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    grey = encode(Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint8)), "PNG", transparency=100)
    assert decode(grey)[:, 0].T.tolist() == [[0, 0, 0], [255, 255, 255], [200, 200, 200]]


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode(encode(Image.fromarray(values), "PNG"))
    expected = torch.from_numpy((values // 256).astype(np.uint8))
    assert all(torch.equal(channel, expected) for channel in image)


def test_1_bit_and_animated_pictures() -> None:
    assert decode(encode(Image.new("1", (3, 2), 1), "PNG")).unique().tolist() == [255]
    red, blue = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (5, 5), "blue")
    first = decode(encode(red, "WEBP", save_all=True, append_images=[blue], lossless=True))
    assert torch.equal(first, pixels(red))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_broken(file_format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, file_format)
    with pytest.raises(BrokenImage):
        decode(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"<!DOCTYPE html><html><body>404</body></html>", b"GIF89a", b"\0" * 99]
)
def test_what_is_no_image_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenImage) as caught:
        decode(data)
    assert str(caught.value)
