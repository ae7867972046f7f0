"""SVG text -> an RGB picture on white, the same on every machine."""

import io
from pathlib import Path

import resvg_py
from lxml import etree
from PIL import Image, ImageChops

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
_OVERSAMPLE = 4
_VISIBLE = 8
_PARSER = etree.XMLParser(recover=True, resolve_entities=True, no_network=True, huge_tree=True)


def parse(data: bytes) -> etree._Element:
    """Parse SVG leniently: old files leave prefixes undeclared and rely on entities of their own DTD."""
    root = etree.fromstring(data, _PARSER)
    if root is None:
        raise ValueError("The file holds no XML element.")
    return root


def repair(root: etree._Element) -> str:
    """Make old SVG acceptable to a strict renderer: add the SVG namespace and a viewBox, drop what is not drawing."""
    for element in list(root.iter(etree.Element)):
        name = str(element.tag).rpartition("}")[2]
        parent = element.getparent()
        if parent is not None and (":" in name or name == "metadata"):
            parent.remove(element)
        elif name == element.tag:
            element.tag = f"{{{SVG}}}{name}"
        for attribute in [str(key) for key in element.attrib if ":" in str(key) and not str(key).startswith("{")]:
            value = element.attrib.pop(attribute)
            if attribute == "xlink:href":
                element.set(f"{{{XLINK}}}href", value)
    width, height = _pixels(root.get("width", "")), _pixels(root.get("height", ""))
    if width and height and not root.get("viewBox"):
        root.set("viewBox", f"0 0 {width:g} {height:g}")
    return etree.tostring(root, encoding="unicode")


def picture_of(root: etree._Element, side: int, fonts: Path) -> Image.Image | None:
    """Repair and draw an SVG, crop it to what is drawn and fit it into `side` x `side`; None if nothing is drawn."""
    page = draw(repair(root), _OVERSAMPLE * side, fonts)
    difference = ImageChops.difference(page, Image.new("RGB", page.size, "white")).convert("L")
    box = difference.point([0] * _VISIBLE + [255] * (256 - _VISIBLE)).getbbox()
    if box is None:
        return None
    picture = page.crop(box)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def draw(svg: str, side: int, fonts: Path) -> Image.Image:
    """Draw `svg` on white, the longer side `side` pixels, with no fonts but those in `fonts`."""
    picture = _draw(svg, fonts, width=side)
    return picture if picture.height <= side else _draw(svg, fonts, height=side)


def _draw(svg: str, fonts: Path, width: int | None = None, height: int | None = None) -> Image.Image:
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=width,
        height=height,
        background="#ffffff",
        dpi=96.0,
        skip_system_fonts=True,
        font_dirs=[str(fonts)],
        font_family="DejaVu Sans",
        sans_serif_family="DejaVu Sans",
        serif_family="DejaVu Serif",
        monospace_family="DejaVu Sans Mono",
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def _pixels(length: str) -> float:
    """A CSS length in pixels at 96 dpi; 0 for percentages and what cannot be read."""
    units = {"px": 1, "pt": 96 / 72, "pc": 16, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96}
    length = length.strip()
    number, factor = (length[:-2], units[length[-2:]]) if length[-2:] in units else (length, 1)
    try:
        return float(number) * factor
    except ValueError:
        return 0.0
