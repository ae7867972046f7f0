"""Encoded bytes -> RGB pixels, as fast as the kept libraries can.

JPEG goes through libjpeg-turbo (simplejpeg) with scaled decoding: a photograph of 1500 pixels that ends up at 224 is
decoded at a half or a quarter of its size. Everything else, and every JPEG that simplejpeg complains about, goes
through Pillow. EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PillowImage
from torch import Tensor

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused (decompression bombs)."""

Pixels = npt.NDArray[np.uint8]


# Web images make Pillow warn of every other EXIF block; what cannot be decoded is counted and reported anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """The bytes cannot be decoded to an image; the loader replaces the sample and counts it."""


def decode(data: bytes, least: int = 0) -> Tensor:
    """Return the image as uint8 (3, H, W) in RGB.

    Args:
        data: the bytes of a JPEG, PNG, WebP or any format that Pillow reads.
        least: if given, a JPEG may be decoded at a smaller scale whose height and width are both still >= `least`.

    Raises:
        BrokenImage: the bytes are not an image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    # Pillow's readers let more through than OSError: struct.error, EOFError, SyntaxError, TypeError, zlib.error ...
    try:
        pixels = _decode_jpeg(data, least) if data[:3] == b"\xff\xd8\xff" else None
        if pixels is None:
            pixels = _decode_pillow(data)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"no image, it begins with {data[:16]!r}") from None
    except Exception as error:
        raise BrokenImage(str(error) or type(error).__name__) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes, least: int) -> Pixels | None:
    """Decode a plain RGB or grey JPEG; None for what needs Pillow's care (CMYK) or judgement (damage)."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if space in ("CMYK", "YCCK"):
            return None
        # strict: data that is cut short or damaged raises instead of yielding grey rows.
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, strict=True)
    except BrokenImage:
        raise
    except ValueError:
        return None
    if b"Exif\0\0" not in data:
        return pixels
    with PillowImage.open(io.BytesIO(data)) as header:
        return _turn(pixels, _orientation(header))


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


def _decode_pillow(data: bytes) -> Pixels:
    with PillowImage.open(io.BytesIO(data)) as opened:
        _check_size(*opened.size)
        opened.load()
        return _turn(_to_rgb(opened), _orientation(opened))


def _to_rgb(image: PillowImage.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off everything above 255.
        image = PillowImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = PillowImage.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return np.array(image.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")
