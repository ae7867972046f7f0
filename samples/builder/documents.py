"""Interleaved documents from software manuals: text blocks with their pictures in place, in the MMC4 layout."""

import hashlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lxml import html
from PIL import Image

from .packages import Package
from .shards import compact_json
from .split import groups, near_duplicates, split_by_label

SIDE = 224
SMALLEST = 64
QUALITY = 60
LONGEST_TEXT = 1000
MAX_IMAGES = 8
GENERATED = ("headerlink", "sphx-glr-footer", "sphx-glr-signature", "sphx-glr-timing", "sphx-glr-script-out")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
FACES_OF_PRIVATE_PEOPLE = "plot_haar_extraction_selection_classification.html"


@dataclass
class Page:
    """A document before it is written: text blocks, and (picture, alt text, index of the text block before it)."""

    source: str
    license: str
    title: str = ""
    texts: list[str] = field(default_factory=list)
    pictures: list[tuple[Image.Image, str, int]] = field(default_factory=list)


def build(gallery: Package, handbook: Package, folder: Path) -> tuple[list[str], list[int]]:
    """Write documents.jsonl and images/; return the split and the group of each document."""
    pages = [page for page in [*_gallery(gallery), *_handbook(handbook)] if page.pictures and len(page.texts) > 1]
    names = [hashlib.sha256("\n".join(page.texts).encode()).hexdigest() for page in pages]
    owner = [index for index, page in enumerate(pages) for _ in page.pictures]
    pairs = near_duplicates([picture for page in pages for picture, _, _ in page.pictures])
    group = groups(len(pages), [(owner[a], owner[b]) for a, b in pairs])
    splits = split_by_label(names, group, [page.license for page in pages], val=0.1, test=0.1)

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    lines = sorted(
        (name, _write(page, name[:12], split, folder)) for page, name, split in zip(pages, names, splits, strict=True)
    )
    (folder / "documents.jsonl").write_text("".join(f"{line}\n" for _, line in lines), encoding="utf-8")
    return splits, group


def _write(page: Page, doc_id: str, split: str, folder: Path) -> str:
    """Write the pictures of a page; return its line of documents.jsonl."""
    infos = []
    for picture, alt, index in page.pictures:
        data = io.BytesIO()
        picture.save(data, "jpeg", quality=QUALITY, optimize=True)
        name = f"{hashlib.sha256(data.getvalue()).hexdigest()[:16]}.jpg"
        (folder / "images" / name).write_bytes(data.getvalue())
        infos.append({"image_name": name, "alt": alt, "matched_text_index": index, "matched_sim": None})
    return compact_json({
        "doc_id": doc_id, "split": split, "title": page.title, "license": page.license, "source": page.source,
        "text_list": page.texts, "image_info": infos, "similarity_matrix": None,
    })  # fmt: skip


def _gallery(package: Package) -> Iterator[Page]:
    """The scikit-image example gallery; BSD-3-Clause."""
    root = package.root / "usr/share/doc/python-skimage-doc/html"
    for path in sorted(root.glob("auto_examples/*/plot_*.html")):
        if path.name == FACES_OF_PRIVATE_PEOPLE:
            continue
        (body,) = html.parse(path).getroot().xpath("//section[contains(@class, 'sphx-glr-example-title')]")
        for name in GENERATED:
            for unwanted in body.xpath(f".//*[contains(@class, '{name}')]"):
                unwanted.drop_tree()
        yield _page(body, path, Page(f"{package.origin}/{path.relative_to(root).as_posix()}", "BSD-3-Clause"))


def _handbook(package: Package) -> Iterator[Page]:
    """The Debian Administrator's Handbook, English; used under CC-BY-SA-3.0."""
    root = package.root / "usr/share/doc/debian-handbook/html/en-US"
    for path in sorted(root.glob("*.html")):
        bodies = html.parse(path).getroot().xpath("//body/div[@class='section' or @class='chapter']")
        if bodies:
            yield _page(bodies[0], path, Page(f"{package.origin}/{path.name}", "CC-BY-SA-3.0"))


def _page(body: html.HtmlElement, path: Path, page: Page) -> Page:
    """Fill `page` with the text blocks and pictures below `body`, in reading order; code is left out."""
    taken: set[html.HtmlElement] = set()
    for element in body.iter():
        if element.getparent() in taken:
            taken.add(element)
        elif _is_text(element):
            taken.add(element)
            if text := " ".join(element.text_content().split())[:LONGEST_TEXT]:
                page.texts.append(text)
        if element.tag == "img" and page.texts and len(page.pictures) < MAX_IMAGES:
            picture = _picture(path.parent / element.get("src", ""))
            if picture is not None:
                page.pictures.append((picture, " ".join(element.get("alt", "").split()), len(page.texts) - 1))
    page.title = page.texts[0] if page.texts else ""
    return page


def _is_text(element: html.HtmlElement) -> bool:
    """Whether the element is one block of text: a heading, a paragraph, or DocBook's `para`."""
    return element.tag in (*HEADINGS, "p") or (element.tag == "div" and element.get("class") == "para")


def _picture(path: Path) -> Image.Image | None:
    """A picture of the manual on white, fitted into SIDE x SIDE; None for icons, thumbnails and other formats."""
    if path.suffix != ".png" or "Common_Content" in path.parts or "thumb" in path.parts:
        return None
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    if min(picture.size) < SMALLEST:
        return None
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    page.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return page.convert("RGB")
