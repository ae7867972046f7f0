"""Decoding: right pixels for every kind of file that the web holds, `BrokenImage` for what is none."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from altsight.core.rng import key
from altsight.data.decode import BrokenImage, decode, open_picture
from altsight.data.views import Crop
from tests.data.conftest import Picture

# Pillow warns of the damaged EXIF blocks in here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


RAMP = np.stack(np.broadcast_arrays(np.arange(16) * 15, np.arange(16)[:, None] * 15, 128), -1).astype(np.uint8)
"""16 x 16 pixels: red grows to the right, green downwards."""

ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf"
    "3jf;xLjeK;0s;a81p@;G3I_%U3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JU+p01*fP5C9MZ0U`hb5di}c"
    "0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0PJPn8D52s98JsSST#6c4DrGh7~QwBh*iE+CK+BRE^B4I6DIvD?XF|Eu0b+RcH=XRfdAP"
)
"""RAMP as an arithmetic-coded JPEG, which Pillow cannot write."""


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def whole(data: bytes, reduction: int) -> Tensor:
    picture = open_picture(data)
    return picture.cut([(0, 0, picture.height, picture.width)], reduction)[0]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG by the book: `rows` are the filter bytes and samples, already compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def row(*samples: int, bits: int = 8) -> bytes:
    """Return one compressed row of a PNG."""
    return zlib.compress(b"\0" + b"".join(sample.to_bytes(bits // 8) for sample in samples))


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
WHITE = [255, 255, 255]
ODD_PNGS = {
    "grey of 16 bits": (png((3, 1), 16, 0, row(0, 0x80FF, 0xFFFF, bits=16)), [[0] * 3, [128] * 3, WHITE]),
    "one of 16 greys is transparent": (
        png((3, 1), 16, 0, row(0, 0x8000, 0x8001, bits=16), trns(0x8000)),
        [[0] * 3, WHITE, [128] * 3],
    ),
    "grey of 8 bits, one transparent": (png((2, 1), 8, 0, row(7, 8), trns(7)), [WHITE, [8] * 3]),
    "colours of 16 bits": (
        png((2, 1), 16, 2, row(0, 0x80FF, 0xFFFF, 0x1111, 0x2222, 0x3333, bits=16)),
        [[0, 128, 255], [17, 34, 51]],
    ),
    "grey and alpha": (png((3, 1), 8, 4, row(9, 255, 9, 0, 0, 128)), [[9] * 3, WHITE, [127] * 3]),
    "grey and alpha of 16 bits": (png((2, 1), 16, 4, row(0x8000, 0xFFFF, 0x8000, 0, bits=16)), [[128] * 3, WHITE]),
    "colours and alpha of 16 bits": (
        png((2, 1), 16, 6, row(0, 0x8000, 0xFFFF, 0xFFFF, 1, 2, 3, 0, bits=16)),
        [[0, 128, 255], WHITE],
    ),
    "1 bit": (png((4, 1), 1, 0, row(0b01010000)), [[0] * 3, WHITE, [0] * 3, WHITE]),
    "2 bits": (png((4, 1), 2, 0, row(0b00011011)), [[0] * 3, [85] * 3, [170] * 3, WHITE]),
    "4 bits": (png((2, 1), 4, 0, row(0x8F)), [[136] * 3, WHITE]),
    "palette": (png((3, 1), 8, 3, row(2, 0, 1), PALETTE), [[70, 80, 90], [10, 20, 30], [40, 50, 60]]),
    "palette of 1 bit": (png((2, 1), 1, 3, row(0b01000000), PALETTE), [[10, 20, 30], [40, 50, 60]]),
    "palette with transparency": (
        png((3, 1), 8, 3, row(2, 0, 1), PALETTE + chunk(b"tRNS", bytes([0, 255]))),
        [[70, 80, 90], WHITE, [40, 50, 60]],
    ),
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_png_of_every_kind(name: str) -> None:
    data, expected = ODD_PNGS[name]
    assert decode(data)[:, 0].T.tolist() == expected


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "ICO", "PPM", "JPEG2000", "WEBP", "AVIF", "MPO", "JPEG"])
def test_every_format_has_the_colours_it_was_given(file_format: str) -> None:
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}, "JPEG": {"quality": 95}, "MPO": {"quality": 95}}
    image = decode(encode(Image.fromarray(RAMP), file_format, **options.get(file_format, {})))
    expected = pixels(Image.fromarray(RAMP))
    if file_format in ("JPEG", "MPO", "AVIF"):  # lossy, with halved colour
        assert difference(image, expected) < 3
    else:
        assert torch.equal(image, expected)


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True}, {"subsampling": "4:1:1"}])
def test_jpeg_of_every_kind(options: dict[str, object]) -> None:
    jpeg = encode(Image.fromarray(RAMP), "JPEG", quality=95, **options)
    assert difference(decode(jpeg), pixels(Image.fromarray(RAMP))) < 4


def test_arithmetic_coding() -> None:
    assert difference(decode(ARITHMETIC), pixels(Image.fromarray(RAMP))) < 2


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_four_inks_as_adobe_writes_them(picture: Picture, kind: str) -> None:
    inks = np.array(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)).resize((64, 64))
    )
    if kind == "CMYK":
        data = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=98)
    else:
        data = simplejpeg.encode_jpeg(255 - inks, 98, "CMYK", "444")  # Adobe's files hold the inks inverted
    assert simplejpeg.decode_jpeg_header(data)[2] == kind
    light = 255 - inks.astype(float)
    expected = torch.from_numpy(light[..., :3] * light[..., 3:] / 255).permute(2, 0, 1)
    assert difference(decode(data), expected) < 1.5
    view = Crop((1.0, 1.0), (1.0, 1.0), flip=False)(data, 8, key(0, 0))
    assert difference(view, F.avg_pool2d(expected, 8)) < 6
    for cut in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff\xd9"):
        with pytest.raises(BrokenImage):
            decode(cut)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_the_first(file_format: str) -> None:
    red, blue = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
    data = encode(red, file_format, save_all=True, append_images=[blue] * 5)
    assert difference(decode(data), pixels(red)) < 2


def test_grey_of_16_bits_in_a_ppm_and_numbers_without_a_range() -> None:
    grey = decode(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 0x8000, 0xFFFF))
    assert grey[:, 0].T.tolist() == [[0] * 3, [128] * 3, WHITE]
    for dtype in (np.float32, np.int32):
        with pytest.raises(BrokenImage, match="no known white"):
            decode(encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


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
    reduced = whole(data, reduction)
    shape = (240 // reduction, 320 // reduction)
    assert reduced.shape[1:] == shape
    full = opened(data).convert("RGB").resize(shape[::-1], Image.Resampling.BOX)
    assert difference(reduced, pixels(full)) < 1.0


@settings(max_examples=60, deadline=None)
@given(side=st.integers(1, 100), other=st.integers(1, 100), reduction=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_a_reduced_box_is_never_too_small(
    picture: Picture, side: int, other: int, reduction: int, data: st.DataObject
) -> None:
    opened_picture = open_picture(picture(4, (side, other), "JPEG"))
    assert (opened_picture.width, opened_picture.height) == (side, other)
    left, top = (data.draw(st.integers(0, length - 1)) for length in (side, other))
    width, height = (data.draw(st.integers(1, n - at)) for n, at in ((side, left), (other, top)))
    _, *shape = opened_picture.cut([(top, left, height, width)], reduction)[0].shape
    for length, pixels in ((height, shape[0]), (width, shape[1])):
        assert length // reduction <= pixels <= -(-length // reduction)


def test_the_reduction_is_the_strongest_below_the_ratio(picture: Picture) -> None:
    jpeg, png = (open_picture(picture(4, (32, 32), kind)) for kind in ("JPEG", "PNG"))
    ratios = (0.1, 1, 1.99, 2, 3.99, 4, 7.99, 8, 1000)
    assert [jpeg.reduction(ratio) for ratio in ratios] == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    assert {png.reduction(ratio) for ratio in ratios} == {1}


def test_a_slightly_damaged_jpeg_is_reduced_too(picture: Picture) -> None:
    data = picture(8, (80, 40), "JPEG")
    damaged = data[:-2] + b"\0\0\0" + data[-2:]
    for reduction in (1, 2, 4, 8):
        assert difference(whole(damaged, reduction), whole(data, reduction)) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(picture: Picture, file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    quality = {"quality": 95} if file_format == "JPEG" else {"lossless": True}  # ignored by PNG and TIFF
    data = picture(5, (40, 24), file_format, exif=exif, **quality)
    expected = pixels(ImageOps.exif_transpose(opened(data)))
    image = decode(data)
    assert image.shape[1:] == ((24, 40) if orientation < 5 else (40, 24))
    assert difference(image, expected) < 1.0


def test_a_rotated_jpeg_is_upright_at_every_scale(picture: Picture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rotated = picture(5, (320, 240), "JPEG", exif=exif)
    assert (open_picture(rotated).height, open_picture(rotated).width) == (320, 240)
    reduced, full = whole(rotated, 4), pixels(ImageOps.exif_transpose(opened(picture(5, (320, 240), exif=exif))))
    assert difference(reduced, F.avg_pool2d(full.float(), 4)) < 2


def test_exif_behind_padding_is_found(picture: Picture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = picture(5, (40, 24), "JPEG", exif=exif)
    padded = data.replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1)
    assert len(padded) == len(data) + 2
    assert torch.equal(decode(padded), decode(data))


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


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_broken(file_format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, file_format)
    with pytest.raises(BrokenImage):
        decode(data[: int(share * len(data))])
