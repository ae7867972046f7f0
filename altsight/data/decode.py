"""Encoded bytes -> RGB pixels, as fast as the kept libraries can, and nothing but `BrokenImage` from hostile bytes.

JPEG goes through libjpeg-turbo (simplejpeg), which can decode at a half, a quarter or an eighth of the size: who wants
a small view reads the size first and then asks for no more pixels than the view needs. All else, and every JPEG that
simplejpeg complains about, goes through Pillow. EXIF rotation is applied, transparency is laid on white, 16-bit grey is
scaled to 8 bits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PillowImage
from torch import Tensor

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused (decompression bombs)."""

MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""A JPEG whose pixels times scans are more is refused: an empty scan takes 10 bytes, but a pass over all pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF")
"""What Pillow may read. Its other readers are of no use here, and some start programs (EPS) or are little tested."""

Pixels = npt.NDArray[np.uint8]

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_APP1, _START_OF_SCAN = 0xE1, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB}
_PROGRESSIVE = {0xC2, 0xCA}


# Web images make Pillow warn of every other EXIF block; what cannot be decoded is counted and reported anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """The bytes cannot be decoded to an image; the loader replaces the sample and counts it."""


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels are decoded on demand.

    height, width: of the upright picture at its full size, in pixels.
    """

    height: int
    width: int
    _orientation: int
    _strongest: int
    _decode: Callable[[int], Pixels]

    def reduction(self, ratio: float) -> int:
        """Return the strongest reduction of the sides that `cut` offers and that is not above `ratio`.

        It is 1, 2, 4 or 8 for a JPEG and 1 for all else. The eighths in between have no fast code in libjpeg-turbo:
        decoding at 5/8 or 7/8 takes longer than decoding in full.
        """
        return next((r for r in (8, 4, 2) if r <= min(ratio, self._strongest)), 1)

    def cut(self, boxes: Sequence[Box], reduction: int = 1) -> list[Tensor]:
        """Decode once and return the pixels in each of `boxes` of the upright picture, uint8 (3, H, W) in RGB.

        H and W are those of the box divided by `reduction`. The edges of the box are moved to whole pixels, by half a
        pixel of the reduced picture at most; a box that is n * reduction pixels long yields n pixels or more.

        Raises:
            BrokenImage: the bytes are damaged or cut short.
        """
        with _broken():
            lying = self._decode(reduction)
            return [torch.from_numpy(self._part(lying, box, reduction)).permute(2, 0, 1) for box in boxes]

    def _part(self, lying: Pixels, box: Box, reduction: int) -> Pixels:
        # Cut before turning: the last pixel of a reduced row may stand for less than the others, and a turn moves it
        # to the front.
        top, left, height, width = box
        if self._orientation in (3, 4, 7, 8):
            top = self.height - top - height
        if self._orientation in (2, 3, 6, 7):
            left = self.width - left - width
        if self._orientation >= 5:
            top, left, height, width = left, top, width, height
        # Halves always up: two edges are then never closer than their distance divided by the reduction.
        edges = (top, top + height, left, left + width)
        top, bottom, left, right = ((edge + reduction // 2) // reduction for edge in edges)
        return _turn(lying[top:bottom, left:right], self._orientation)


def open_picture(data: bytes) -> Picture:
    """Return the picture in the bytes of a JPEG or of any other of `FORMATS`; of an animation, the first frame.

    Raises:
        BrokenImage: the bytes are not an image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    with _broken():
        picture = _open_jpeg(data) if data[:3] == b"\xff\xd8\xff" else None
        if picture is not None:
            return picture
        with _open_pillow(data) as opened:
            opened.load()
            pixels, orientation = _to_rgb(opened), _orientation(opened)
        return _picture(pixels.shape[0], pixels.shape[1], orientation, 1, lambda _: pixels)


def decode(data: bytes) -> Tensor:
    """Return the whole image as uint8 (3, H, W) in RGB.

    Raises:
        BrokenImage: as `open_picture`.
    """
    picture = open_picture(data)
    return picture.cut([(0, 0, picture.height, picture.width)])[0]


@contextmanager
def _broken() -> Iterator[None]:
    """Turn whatever the body raises into BrokenImage."""
    # Pillow's readers let more through than OSError: struct.error, EOFError, SyntaxError, TypeError, zlib.error ...
    try:
        yield
    except BrokenImage:
        raise
    except Exception as error:
        raise BrokenImage(str(error) or type(error).__name__) from None


def _open_jpeg(data: bytes) -> Picture | None:
    """Read the header of a JPEG; None if that takes Pillow's judgement."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, _scans(data))
    orientation = 1
    if any(marker == _APP1 and data[at : at + 6] == b"Exif\0\0" for marker, at in _segments(data)):
        with _open_pillow(data) as header:
            orientation = _orientation(header)
    return _picture(height, width, orientation, 8, partial(_decode_jpeg, data, height, width))


def _picture(height: int, width: int, orientation: int, strongest: int, decode: Callable[[int], Pixels]) -> Picture:
    upright = (width, height) if orientation >= 5 else (height, width)
    return Picture(*upright, orientation, strongest, decode)


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, where its content begins) for the segments of a JPEG up to its first scan."""
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        yield data[at + 1], at + 4
        if data[at + 1] == _START_OF_SCAN:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4])


def _scans(data: bytes) -> int:
    """Return how often decoding passes over all pixels of a JPEG."""
    components, progressive = 0, False
    for marker, at in _segments(data):
        if marker in _FRAMES:
            components, progressive = data[at + 5], marker in _PROGRESSIVE
        elif marker == _START_OF_SCAN and data[at] == components and not progressive:
            return 1  # all in one: libjpeg stops behind it
    return data.count(bytes([0xFF, _START_OF_SCAN]))


def _decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> Pixels:
    """Decode a JPEG of `height` x `width` pixels (not turned), its sides divided by `reduction` and rounded up."""
    least = -(-height // reduction), -(-width // reduction)
    try:
        # strict: data that is cut short or damaged raises instead of yielding grey rows.
        return simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], strict=True)
    except ValueError as error:
        if "premature end of data segment" in str(error):
            raise  # the rest is up to Pillow, but this it takes for a picture with grey rows
    with _open_pillow(data) as opened:
        opened.draft(None, (width // reduction, height // reduction))
        opened.load()
        return _to_rgb(opened)


def _open_pillow(data: bytes) -> PillowImage.Image:
    try:
        opened = PillowImage.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BrokenImage(f"no image, it begins with {data[:16]!r}") from None
    _check_size(*opened.size, _scans(data) if opened.format in ("JPEG", "MPO") else 1)
    return opened


def _orientation(image: PillowImage.Image) -> int:
    """Return the EXIF orientation 1..8 of `image`; 1 where there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        value = None
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5..8 exchange rows and columns first; then rows, columns or both are reversed."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: PillowImage.Image) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # 16 bits of grey. Pillow's own conversion cuts off everything above 255.
        grey = np.asarray(image)
        image = PillowImage.fromarray(np.where(grey == image.info.get("transparency"), 255, grey >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BrokenImage(f"numbers of the kind {image.mode} have no known white")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = PillowImage.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(width: int, height: int, scans: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")
    if width * height * scans > MAX_SCANNED_PIXELS:
        raise BrokenImage(f"{scans:,} scans of {width} x {height} pixels are more than any camera makes")
