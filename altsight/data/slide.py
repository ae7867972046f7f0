"""Pictures too large to be held in memory: opened by openslide, tifffile or Pillow, and read part by part.

Vendors' slides (SVS, NDPI, MRXS ...) are read by openslide, all other TIFF (tiled, pyramidal, OME) by tifffile, and
whatever fits into memory by Pillow.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image

from altsight.core.errors import UserError
from altsight.data.decode import BrokenImage, decode

Pixels = npt.NDArray[np.uint8]

TIFF = frozenset({".tif", ".tiff"})
VENDORS = frozenset({".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm"})
"""Suffixes that only openslide reads."""
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SUFFIXES = TIFF | VENDORS | PICTURES
CHUNK_BYTES = 2**26
"""What a slide keeps decoded, so that neighbouring tiles do not decode the same piece of the file again."""
BLOCK = 1024
"""Side of the parts, in pixels of a level, that a thumbnail is made of."""


class Slide(Protocol):
    """A picture with one or more levels of resolution.

    size: (width, height) in pixels of level 0. downsamples: by how much every level is smaller than level 0, ascending
    from 1. magnification: of level 0, where the file tells it (40 for 0.25 micrometres a pixel).
    """

    size: tuple[int, int]
    downsamples: tuple[float, ...]
    magnification: float | None

    def read(self, left: int, top: int, level: int, side: int) -> Pixels:
        """Return uint8 (side, side, 3): `side` pixels of `level` from (left, top) in pixels of level 0 on.

        What lies outside of the picture is white. May be called by many threads.

        Args:
            left, top: inside of the picture; the part may reach beyond it to the right and below.

        Raises:
            UserError: this part of the file is damaged.
        """
        ...


def open_slide(path: Path) -> Slide:
    """Open the picture at `path`; only its header is read, but for pictures that Pillow reads.

    Raises:
        UserError: there is none, its format is not known or its library is missing, or it is stored in one piece that
            is too large.
    """
    if not path.exists():
        raise UserError(f"the slide '{path}' does not exist.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"'{path}' is no slide: known are {', '.join(sorted(SUFFIXES))}.")
    if suffix in PICTURES:
        return PictureSlide(path)
    if suffix in VENDORS or _is_vendors(path):
        return VendorSlide(path)
    return TiffSlide(path)


def thumbnail(slide: Slide, longest: int = BLOCK) -> Pixels:
    """Return the whole picture, its longer side shrunk to `longest` pixels: uint8 (H, W, 3).

    It is put together from parts, so that a picture without smaller levels is never held as a whole.
    """
    factor = max(max(slide.size) / longest, 1.0)
    level = max(i for i, down in enumerate(slide.downsamples) if down <= factor)
    shrink = factor / slide.downsamples[level]
    part = max(int(BLOCK / shrink), 1)
    width, height = (max(round(length / factor), 1) for length in slide.size)
    small = PIL.Image.new("RGB", (width, height), "white")
    for top in range(0, height, part):
        for left in range(0, width, part):
            pixels = slide.read(round(left * factor), round(top * factor), level, max(round(part * shrink), 1))
            block = PIL.Image.fromarray(pixels).resize((part, part), PIL.Image.Resampling.BOX)
            small.paste(block, (left, top))
    return np.asarray(small)


class PictureSlide:
    """A picture that Pillow reads, held in memory.

    Raises:
        UserError: it cannot be decoded, or has more pixels than `altsight.data.decode.MAX_PIXELS`.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._pixels: Pixels = decode(path.read_bytes()).permute(1, 2, 0).numpy()
        except (OSError, BrokenImage) as error:
            raise UserError(f"the slide '{path}' cannot be read ({error}): save it as a tiled TIFF.") from None
        self.size = (self._pixels.shape[1], self._pixels.shape[0])
        self.downsamples: tuple[float, ...] = (1.0,)
        self.magnification: float | None = None

    def read(self, left: int, top: int, level: int, side: int) -> Pixels:
        """Return a part; see `Slide`."""
        part = self._pixels[top : top + side, left : left + side]
        found = np.full((side, side, 3), 255, np.uint8)
        found[: part.shape[0], : part.shape[1]] = part
        return found


class VendorSlide:
    """A slide of a scanner's vendor, read by openslide; see `open_slide`."""

    def __init__(self, path: Path) -> None:
        self._path, library = path, _openslide()
        try:
            self._slide: Any = library.OpenSlide(path)
        except library.OpenSlideError as error:
            raise UserError(f"the slide '{path}' cannot be read ({error}): is it whole?") from None
        self._errors = library.OpenSlideError
        self.size: tuple[int, int] = self._slide.dimensions
        self.downsamples: tuple[float, ...] = tuple(self._slide.level_downsamples)
        power = self._slide.properties.get("openslide.objective-power")
        self.magnification = float(power) if power else None

    def read(self, left: int, top: int, level: int, side: int) -> Pixels:
        """Return a part; see `Slide`."""
        try:
            part = self._slide.read_region((left, top), level, (side, side))
        except self._errors as error:
            raise UserError(f"the slide '{self._path}' is damaged at ({left}, {top}) ({error}).") from None
        white = PIL.Image.new("RGB", part.size, "white")
        white.paste(part, mask=part.getchannel("A"))
        return np.asarray(white)


class TiffSlide:
    """A TIFF, read by tifffile chunk by chunk (its tiles, or its strips); see `open_slide`."""

    def __init__(self, path: Path) -> None:
        try:
            import tifffile
        except ModuleNotFoundError:
            raise UserError("TIFF slides need tifffile: `pip install 'altsight[slides]'`.") from None
        self._path = path
        try:
            file: Any = tifffile.TiffFile(path)
            self._pages = [level.keyframe for level in file.series[0].levels]
        except Exception as error:  # tifffile lets struct.error, IndexError and others through
            raise UserError(f"the slide '{path}' cannot be read ({error}): is it a whole TIFF?") from None
        self._file = file
        for page in self._pages:
            _check_page(path, page)
        first = self._pages[0]
        self.size = (int(first.imagewidth), int(first.imagelength))
        self.downsamples = tuple(first.imagewidth / page.imagewidth for page in self._pages)
        self.magnification = _magnification(f"{file.ome_metadata or ''} {first.description}")
        chunk = max(int(np.prod(page.chunks)) for page in self._pages)
        self._chunk = functools.lru_cache(max(CHUNK_BYTES // chunk, 1))(self._decode)

    def read(self, left: int, top: int, level: int, side: int) -> Pixels:
        """Return a part; see `Slide`."""
        page, down = self._pages[level], self.downsamples[level]
        x, y = round(left / down), round(top / down)
        high, wide = page.chunks[:2]
        found = np.full((side, side, 3), 255, np.uint8)
        for row in range(y // high, -(-min(y + side, page.imagelength) // high)):
            for column in range(x // wide, -(-min(x + side, page.imagewidth) // wide)):
                chunk = self._chunk(level, row * page.chunked[1] + column)
                _paste(chunk, found, row * high - y, column * wide - x)
        return found

    def _decode(self, level: int, index: int) -> Pixels:
        """Return a chunk without its padding, uint8 (h, w, 3)."""
        page = self._pages[level]
        with self._file.filehandle.lock:
            self._file.filehandle.seek(page.dataoffsets[index])
            data = self._file.filehandle.read(page.databytecounts[index]) if page.databytecounts[index] else None
        try:
            decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec raises errors of its own
            raise UserError(f"the slide '{self._path}' is damaged in chunk {index} ({error}).") from None
        if decoded is None:  # a chunk that was never written
            return np.full((*shape[1:3], 3), 255, np.uint8)
        high, wide = page.chunks[:2]
        row, column = divmod(index, page.chunked[1])
        pixels = decoded[0, : page.imagelength - row * high, : page.imagewidth - column * wide]
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
        return pixels[..., :1].repeat(3, axis=2) if pixels.shape[2] < 3 else pixels[..., :3]


def _paste(chunk: Pixels, onto: Pixels, top: int, left: int) -> None:
    """Put `chunk` onto `onto` at (top, left), which may lie outside."""
    rows = slice(max(top, 0), min(top + chunk.shape[0], onto.shape[0]))
    columns = slice(max(left, 0), min(left + chunk.shape[1], onto.shape[1]))
    onto[rows, columns] = chunk[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _check_page(path: Path, page: Any) -> None:
    """Refuse what cannot be read piece by piece as colours or grey."""
    if page.dtype not in (np.uint8, np.uint16) or page.photometric.name not in ("RGB", "YCBCR", "MINISBLACK"):
        raise UserError(f"the slide '{path}' holds {page.photometric.name} {page.dtype}: save it as 8-bit RGB.")
    if (page.planarconfig != 1 and page.samplesperpixel > 1) or page.imagedepth != 1:
        raise UserError(f"the slide '{path}' keeps its channels apart: save it with interleaved RGB.")
    if np.prod(page.chunks) > 4 * CHUNK_BYTES:
        raise UserError(f"the slide '{path}' is stored in pieces of {page.chunks[:2]} pixels: save it as a tiled TIFF.")


def _magnification(text: str) -> float | None:
    """Return the objective's power that a TIFF's description tells (OME, Aperio)."""
    found = re.search(r'(?:NominalMagnification="|AppMag = )(\d+(?:\.\d+)?)', text)
    return float(found.group(1)) if found else None


def _is_vendors(path: Path) -> bool:
    """True for a TIFF that openslide knows the scanner of."""
    try:
        library = _openslide()
    except UserError:
        return False
    return library.OpenSlide.detect_format(path) not in (None, "generic-tiff")


def _openslide() -> Any:
    try:
        import openslide
    except (ModuleNotFoundError, OSError):
        raise UserError("slides of scanners need openslide: `pip install 'altsight[slides]'`.") from None
    return openslide
