"""Files that are damaged or made to break a decoder: the right pixels or `BrokenImage`, in bounded time and memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from altsight.core.rng import key
from altsight.data.decode import FORMATS, MAX_PIXELS, BrokenImage, decode
from altsight.data.views import Crop, center_crop
from tests.data.conftest import Picture
from tests.data.test_decode import RAMP, chunk, encode, png

# Pillow warns of large images and of damaged tags.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

MEGABYTE = 2**20
Grown = Callable[[], int]


def zeros(megabytes: int) -> bytes:
    """Return that many zeros, compressed a thousandfold."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(MEGABYTE)) for _ in range(megabytes)) + deflate.flush()


@pytest.fixture
def grown() -> Grown:
    """Return a function of the bytes by which the memory of this process has grown at most since the test began."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        pytest.skip("peak memory is read from Linux's /proc")

    def value(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    refs.write_text("5")
    before = value("VmRSS")
    return lambda: value("VmHWM") - before


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_extreme_shapes(file_format: str, size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size, (200, 100, 50)), file_format)
    colour = torch.tensor([200, 100, 50]).view(3, 1, 1)
    assert decode(data).shape == (3, size[1], size[0])
    for view in (Crop()(data, 32, key(0, 0)), Crop((0.01, 0.02))(data, 8, key(0, 1))):
        assert (view.int() - colour).abs().max() <= 6
    assert (center_crop(data, 16).int() - colour).abs().max() <= 6


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("tenths", range(10))
def test_a_jpeg_that_is_cut_short_is_never_grey(options: dict[str, object], tenths: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", **options)
    start = data[: tenths * len(data) // 10]
    for cut in (start, start + b"\xff\xd9"):  # as it is, and with an end marker that some servers add
        for read in (decode, lambda d: Crop((0.9, 1.0))(d, 16, key(0, 0))):
            with pytest.raises(BrokenImage):
                read(cut)


def test_what_follows_a_picture_is_ignored(picture: Picture) -> None:
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = picture(1, (40, 30), file_format)
        for garbage in (b"\0" * 1000, b"<html>", data[:50], np.random.default_rng(0).bytes(5000)):
            assert torch.equal(decode(data + garbage), decode(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b"%PDF-1.7\n",
        b"\0" * 999,
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    for read in (decode, lambda d: Crop()(d, 8, key(0, 0)), lambda d: center_crop(d, 8)):
        with pytest.raises(BrokenImage, match="no image"):
            read(data)


@pytest.mark.parametrize("file_format", ["EPS", "PCX", "TGA", "ICNS", "SGI", "DDS"])
def test_formats_that_are_not_on_the_list_are_refused(file_format: str) -> None:
    assert file_format not in FORMATS
    data = encode(Image.fromarray(RAMP), file_format)
    with pytest.raises(BrokenImage, match="no image"):
        decode(data)


def claims() -> dict[str, bytes]:
    """Return a small file of each kind whose header claims 60,000 x 60,000 pixels, or the most that it can."""

    def claim(
        file_format: str, mark: bytes, skip: int, numbers: str, values: tuple[int, int], **options: object
    ) -> bytes:
        data = bytearray(encode(Image.fromarray(RAMP), file_format, **options))
        struct.pack_into(numbers, data, data.index(mark) + len(mark) + skip, *values)
        return bytes(data)

    side, most = (60_000, 60_000), (65_535, 65_535)
    animated = {"save_all": True, "append_images": [Image.fromarray(RAMP[::-1])]}
    inner = png(side, 8, 6, zeros(1))
    tiff = bytearray(encode(Image.fromarray(RAMP), "TIFF"))
    for tag in (256, 257):
        struct.pack_into("<I", tiff, tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8, 60_000)
    return {
        "JPEG": claim("JPEG", b"\xff\xc0", 3, ">HH", side),
        "progressive JPEG": claim("JPEG", b"\xff\xc2", 3, ">HH", side, progressive=True),
        "PNG": png(side, 8, 2, zeros(1)),
        "GIF": claim("GIF", b"GIF8", 2, "<HH", most),
        "WebP": claim("WEBP", b"\x9d\x01\x2a", 0, "<HH", (16_383, 16_383)),
        "lossless WebP": claim("WEBP", b"VP8L", 5, "<HH", (0xFFFF, 0xFFFF >> 4), lossless=True),
        "animated WebP": claim("WEBP", b"VP8X", 8, "<HxHx", most, **animated),
        "BMP": claim("BMP", b"BM", 16, "<II", side),
        "TIFF": bytes(tiff),
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
        "ICO": struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner,
        "AVIF": claim("AVIF", b"ispe", 4, ">II", (16_000, 11_000)),  # libavif reads no more
        "JPEG2000": claim("JPEG2000", b"ihdr", 0, ">II", side),
    }


@pytest.mark.parametrize("name", claims())
def test_huge_claims_are_refused_from_the_header(name: str, grown: Grown) -> None:
    with pytest.raises(BrokenImage, match="pixels"):
        decode(claims()[name])
    assert grown() < 50 * MEGABYTE


@pytest.mark.parametrize("side", [30_000, 10_100])
def test_a_whole_bomb_is_refused_from_the_header(side: int, grown: Grown) -> None:
    bomb = png((side, side), 1, 0, zeros(side * side // 8 // MEGABYTE + 1))
    assert side * side > MAX_PIXELS
    assert len(bomb) < 200_000
    with pytest.raises(BrokenImage, match="pixels"):
        decode(bomb)
    assert grown() < 50 * MEGABYTE


def test_the_largest_picture_takes_bounded_memory(grown: Grown) -> None:
    side = 9_999
    assert decode(png((side, side), 1, 0, zeros(13))).shape == (3, side, side)
    # Pillow's 1 and 4 bytes for each pixel, and twice the 3 that are handed on; the process itself breathes by some MB.
    assert grown() < 11 * MAX_PIXELS + 200 * MEGABYTE


TINY = zlib.compress(bytes(16 * 49))
HEAVY_CHUNKS = {
    "text": chunk(b"zTXt", b"a\0\0" + zeros(300)),
    "international text": chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(300)),
    "colour profile": chunk(b"iCCP", b"a\0\0" + zeros(300)),
    "many texts": b"".join(chunk(b"zTXt", b"a%d\0\0" % i + zeros(1)) for i in range(300)),
}


@pytest.mark.parametrize("name", HEAVY_CHUNKS)
def test_what_a_png_holds_beside_its_pixels_is_not_inflated(name: str, grown: Grown) -> None:
    with pytest.raises(BrokenImage, match=r"text|TEXT"):
        decode(png((16, 16), 8, 2, TINY, HEAVY_CHUNKS[name]))
    assert grown() < 100 * MEGABYTE


def test_pixels_beyond_the_last_row_are_not_inflated(grown: Grown) -> None:
    assert decode(png((16, 16), 8, 2, zeros(300))).shape == (3, 16, 16)
    assert grown() < 10 * MEGABYTE


@pytest.mark.parametrize("version", [b"\1\1", b"\7\7"], ids=["to simplejpeg", "to Pillow"])
def test_a_jpeg_of_a_thousand_passes_is_refused(version: bytes) -> None:
    data = encode(Image.new("L", (3000, 3000)), "JPEG", progressive=True).replace(b"JFIF\0\1\1", b"JFIF\0" + version)
    assert decode(data).shape == (3, 3000, 3000)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BrokenImage, match="scans"):
        decode(data[:-2] + data[last:-2] * 1000 + b"\xff\xd9")


def test_passes_are_counted_in_a_jpeg_of_one_scan_for_each_colour(picture: Picture) -> None:
    data = picture(0, (3000, 3000), "JPEG")
    start = data.index(b"\xff\xda")
    one_colour = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + data[start + 14 : start + 30]
    with pytest.raises(BrokenImage, match="1,000 scans"):
        decode(data[:start] + one_colour * 1000 + b"\xff\xd9")


EDITS = st.tuples(
    st.sampled_from(["put", "cut", "insert"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x27\x0f", b"\x0f\x27"]),
)


@pytest.mark.parametrize("file_format", ["MPO", *FORMATS])
@settings(max_examples=60, deadline=timedelta(seconds=10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDITS, min_size=1, max_size=6), progressive=st.booleans())
def test_damaged_files_raise_nothing_but_broken_image(
    file_format: str, picture: Picture, edits: list[tuple[str, float, bytes]], progressive: bool, grown: Grown
) -> None:
    data = picture(9, (24, 20), file_format, **({"progressive": progressive} if file_format == "JPEG" else {}))
    for kind, share, content in edits:
        at = int(share * len(data))
        data = data[:at] + (b"" if kind == "cut" else content) + data[at + (0 if kind == "insert" else len(content)) :]
    for read in (decode, lambda d: Crop()(d, 8, key(0, 0))):
        try:
            image = read(data)
        except BrokenImage:
            continue
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert image.shape[1] * image.shape[2] <= MAX_PIXELS
    assert grown() < 20 * MAX_PIXELS
