"""A contact sheet: the samples that a run sees first, as one HTML page or one PNG picture."""

from __future__ import annotations

import io
import math
import re
import textwrap
import unicodedata
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Text
from altsight.data.decode import BrokenImage, decode
from altsight.data.prepared import Prepared
from altsight.data.sources import Source
from altsight.data.survey import THREADS, Progress, silent

SIDE = 192
"""Pixels of the longer side of a thumbnail; smaller images keep their size."""
COLUMNS = 10
"""Samples in a row of a PNG."""
GAP, HEAD, BELOW = 16, 76, 40
"""Pixels of a PNG between two samples, above the first row, and under an image for two lines of text."""
_PAPER, _GREY, _INK = "#fcfcfa", "#e6e5e0", "#1d1f22"
_CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --raised: #eeede8; --ink: #1d1f22; --muted: #62666d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --raised: #24282d; --ink: #e7e5e0; --muted: #9ba0a8; }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--paper); color: var(--ink); max-width: 96rem; margin: 0 auto; padding: 2rem 1.25rem 4rem;
  font: 14px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere;
}
header { margin-bottom: 1.75rem; }
h1 { font-size: 1.5rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; margin-bottom: .25rem; }
header p, small, .tile p, summary { color: var(--muted); }
small, details { font-size: .75rem; line-height: 1.35; display: block; }
b { color: var(--ink); font-weight: 600; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: 1.75rem 1rem; }
main > *, .parts > * { min-width: 0; }
figcaption > * { margin-top: .35rem; }
.tile { aspect-ratio: 1; display: grid; place-items: center; position: relative; background: var(--raised); }
.tile p { padding: .75rem; text-align: center; }
.tile img { position: absolute; width: 100%; height: 100%; object-fit: scale-down; }
.text { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.text:focus { -webkit-line-clamp: none; }
summary { cursor: pointer; }
ul { padding-left: 1.1rem; }
.document { grid-column: 1 / -1; border-top: 1px solid var(--raised); padding-top: 1rem; }
.parts { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.parts .text { -webkit-line-clamp: 7; flex: 1 1 14rem; max-width: 26rem; }
.image { flex: 0 0 9.5rem; }
"""


@dataclass(frozen=True)
class Tile:
    """An image of a sample. picture: its thumbnail, None where it is broken. about: its size, or why it is broken."""

    picture: PillowImage.Image | None
    about: str


@dataclass(frozen=True)
class Shown:
    """A sample: texts and images in reading order, other texts that it may show, its class ("" for none), its place."""

    parts: tuple[str | Tile, ...]
    others: tuple[str, ...]
    label: str
    place: str

    @property
    def tiles(self) -> list[Tile]:
        """The images alone."""
        return [part for part in self.parts if isinstance(part, Tile)]

    @property
    def texts(self) -> list[str]:
        """The texts alone."""
        return [part for part in self.parts if isinstance(part, str)]


def write_sheet(prepared: Prepared, path: Path, count: int = 60, seed: int = 0, progress: Progress = silent) -> None:
    """Write pictures and texts of the first `count` samples of a run under `seed`, as that run draws them, to `path`.

    The suffix of `path` is .html (one file that fetches nothing) or .png (a grid of thumbnails, each with two lines of
    text). A sample that a run would replace, because it cannot be decoded, is a grey tile that says why.

    Raises:
        UserError: another suffix, no sample asked for, the file cannot be written, or a shard is gone.
    """
    suffix = path.suffix.lower()
    if suffix not in (".html", ".png"):
        raise UserError(f"the contact sheet '{path}' would be neither a page nor a picture: name it .html or .png.")
    if count < 1:
        raise UserError(f"a contact sheet of {count} samples shows nothing: use 1 or more.")
    samples = _draw(prepared.source, min(count, len(prepared.source)), seed, progress)
    about = f"{len(samples):,} of {len(prepared.source):,} samples, the first that a run with seed {seed} sees"
    about += f", data {prepared.hash()}" if prepared.hash() else ""
    broken = sum(tile.picture is None for sample in samples for tile in sample.tiles)
    about += f"; {broken:,} {'image' if broken == 1 else 'images'} cannot be decoded" if broken else ""
    title = f"Contact sheet of {prepared.directory}"
    _write(path, _html(title, about, samples) if suffix == ".html" else _png(title, about, samples))


def _write(path: Path, content: bytes) -> None:
    """Write by way of a temporary file, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(
            f"the contact sheet '{path}' cannot be written ({error.strerror}): name another file."
        ) from None


def _draw(source: Source, count: int, seed: int, progress: Progress) -> list[Shown]:
    samples = source.order(seed).samples(np.arange(count)).tolist()
    shown: list[Shown] = []
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map if source.is_remote else map
        for sample in read(lambda position: _show(source, samples[position], seed, position), range(count)):
            shown.append(sample)
            progress("drawing samples", len(shown), count)
    return shown


def _show(source: Source, sample: int, seed: int, position: int) -> Shown:
    parts: tuple[str | Tile, ...]
    label = ""
    try:
        document = source.document(sample, key(seed, position))
        parts = tuple(part.value if isinstance(part, Text) else _tile(part.data) for part in document.parts)
        label = source.classes[document.meta["label"]] if "label" in document.meta else ""
    except BrokenImage as error:
        parts = (Tile(None, str(error)),)
    others = tuple(text for text in source.texts(sample) if text not in parts)
    return Shown(parts, others, label, source.name(sample))


def _tile(data: bytes) -> Tile:
    try:
        pixels = decode(data)
    except BrokenImage as error:
        return Tile(None, str(error))
    picture = PillowImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    about = f"{picture.width} x {picture.height}, {len(data) / 1000:,.1f} kB"
    picture.thumbnail((SIDE, SIDE))
    return Tile(picture, about)


def _html(title: str, about: str, samples: Sequence[Shown]) -> bytes:
    figures = "\n".join(_figure(sample) for sample in samples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_CSS}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>
<main>
{figures}
</main>
</body>
</html>
""".encode(errors="replace")


def _figure(sample: Shown) -> str:
    place = f'<span title="{escape(sample.place)}">{escape(sample.place.rsplit("/", 1)[-1])}</span>'
    label = f"<b>{escape(sample.label)}</b>" if sample.label else ""
    more = ""
    if sample.others:
        items = "".join(f'<li dir="auto">{escape(text)}</li>' for text in sample.others)
        number = f"{len(sample.others):,} more text{'s' * (len(sample.others) > 1)}"
        more = f"<details><summary>{number}</summary><ul>{items}</ul></details>"
    if len(sample.parts) > 2:
        parts, below = "".join(_in_order(sample.parts)), f"<small>{place}</small>{more}"
        return f'<figure class="document"><div class="parts">{parts}</div><figcaption>{below}</figcaption></figure>'
    images, texts = "".join(map(_image, sample.tiles)), "".join(map(_text, sample.texts))
    size = "".join(tile.about for tile in sample.tiles if tile.picture)
    about = f"<small>{'<br>'.join(filter(None, (label, size, place)))}</small>"
    return f"<figure>{images}<figcaption>{texts}{about}{more}</figcaption></figure>"


def _in_order(parts: Sequence[str | Tile]) -> Iterator[str]:
    """Yield the images with their sizes, and the texts between two of them as one paragraph."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if texts:
            yield _text(" ".join(texts))
            texts = []
        yield f'<div class="image">{_image(part)}<small>{escape(part.about) if part.picture else ""}</small></div>'
    if texts:
        yield _text(" ".join(texts))


def _text(text: str) -> str:
    # The style cuts long texts. All of it is seen by hovering, or by a tap, which gives it the focus.
    return f'<p class="text" dir="auto" tabindex="0" title="{escape(text)}">{escape(text)}</p>'


def _image(tile: Tile) -> str:
    if tile.picture is None:
        return f'<div class="tile"><p>{escape(tile.about)}</p></div>'
    buffer = io.BytesIO()
    tile.picture.save(buffer, "WEBP", quality=80)
    return f'<div class="tile"><img src="data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}" alt=""></div>'


def _png(title: str, about: str, samples: Sequence[Shown]) -> bytes:
    columns = min(COLUMNS, len(samples))
    rows = math.ceil(len(samples) / columns)
    width = max(4, columns) * (SIDE + GAP) + GAP
    sheet = PillowImage.new("RGB", (width, HEAD + rows * (SIDE + BELOW + GAP)), _PAPER)
    sheet.paste(_words(title, (width - 2 * GAP, 26), size=20), (GAP, GAP))
    sheet.paste(_words(about, (width - 2 * GAP, 20)), (GAP, GAP + 28))
    for number, sample in enumerate(samples):
        left, top = GAP + number % columns * (SIDE + GAP), HEAD + number // columns * (SIDE + BELOW + GAP)
        sheet.paste(_square(sample.tiles), (left, top))
        sheet.paste(_words(" ".join(sample.texts), (SIDE, BELOW - 4)), (left, top + SIDE + 4))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _square(tiles: Sequence[Tile]) -> PillowImage.Image:
    """Return the images of a sample in a square of SIDE pixels: one in the middle of it, several in a grid."""
    across = math.ceil(math.sqrt(len(tiles)))
    side = SIDE // across
    room = side if across == 1 else side - 4
    whole = PillowImage.new("RGB", (SIDE, SIDE), _GREY)
    for number, tile in enumerate(tiles):
        if tile.picture is None:
            picture = _words(tile.about, (room - 16, room - 16), _GREY)
        else:
            picture = tile.picture.copy()
            picture.thumbnail((room, room))
        left, top = number % across * side, number // across * side
        whole.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    return whole


def _words(text: str, box: tuple[int, int], paper: str = _PAPER, size: int = 13) -> PillowImage.Image:
    """Return `text` in lines on a picture of `box` pixels; what does not fit is cut off."""
    picture = PillowImage.new("RGB", box, paper)
    font = ImageFont.load_default(size)
    text = _drawable(text, font)[:1000]
    most = int(2 * len(text) * box[0] / max(1.0, font.getlength(text)))
    wrapped = (textwrap.wrap(text, n, max_lines=box[1] // (size + 4), placeholder="…") for n in range(most, 0, -1))
    lines = next((lines for lines in wrapped if all(font.getlength(line) <= box[0] for line in lines)), [])
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), _INK, font, spacing=4)
    return picture


def _drawable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return `text` without accents, and with an ellipsis for every stretch of characters that `font` lacks."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lacking = bytes(font.getmask("\uffff"))
    known = {c: c == " " or bytes(font.getmask(c)) != lacking for c in set(plain)}
    return re.sub(r"…[…\s]*…", "…", "".join(c if known[c] else "…" for c in plain))
