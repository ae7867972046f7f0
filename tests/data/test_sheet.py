"""The contact sheet shows what a run sees first."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import altsight_samples
import numpy as np
import pytest
from PIL import Image

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.decode import decode
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.prepared import Prepared
from altsight.data.sheet import BELOW, COLUMNS, GAP, HEAD, SIDE, write_sheet
from altsight.data.sources import Interleaves
from tests.data.conftest import Picture, WriteTar

CAPTIONS = (
    "<script>alert('x')</script> & \"quoted\"",
    "漢字とかなの説明文",
    "قطة على الأريكة",
    "😀 Ein Bär am Fluß",
    "word " * 300,
    "averylongwordwithoutanyspace" * 20,
)
SIZES = ((300, 200), (40, 30), (600, 20), (10, 400), (192, 192), (5, 5))
BROKEN = {3: b"<html>gone & lost</html>", 8: b""}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, picture: Picture, write_tar: WriteTar) -> Prepared:
    """24 samples with every kind of caption and shape, two captions each, classes, and two broken images."""
    folder = tmp_path_factory.mktemp("sheet")
    members: dict[str, bytes] = {}
    for i in range(24):
        file_format = "JPEG" if i % 2 else "PNG"
        members[f"{i}.png"] = BROKEN.get(i, picture(i, SIZES[i % 6], file_format))
        fields = {"kind": ["cat", "dog & <co>"][i % 2], "other": f"other words {i}"}
        members |= {f"{i}.txt": CAPTIONS[i % 6].encode(), f"{i}.json": json.dumps(fields).encode()}
    write_tar(folder / "data" / "a.tar", members)
    config = PrepareConfig(
        str(folder / "data"), folder / "out", ("{txt}", "{other}"), label="kind", vocab_size=300, workers=1
    )
    return prepare(config)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The embedded documents."""
    out = tmp_path_factory.mktemp("documents") / "out"
    return prepare(PrepareConfig(str(altsight_samples.documents()), out, vocab_size=500, workers=1))


class Page(HTMLParser):
    """The elements of a page; checks that every one is closed. figures: for each, what it shows in reading order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.figures: list[list[tuple[str, str]]] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag == "figure":
            self.figures.append([])
        if tag == "img":
            self.figures[-1].append(("img", dict(attrs)["src"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "figure" in self.open and data.strip():
            self.figures[-1].append((self.open[-1], data))

    def texts(self, number: int) -> list[str]:
        """Return all that figure `number` says."""
        return [text for tag, text in self.figures[number] if tag != "img"]

    def pictures(self, number: int) -> list[Image.Image]:
        """Return the thumbnails of figure `number`."""
        sources = [source for tag, source in self.figures[number] if tag == "img"]
        head = "data:image/webp;base64,"
        assert all(source.startswith(head) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))) for source in sources]


def page(prepared: Prepared, path: Path, count: int = 60, seed: int = 0) -> Page:
    """Write the sheet as HTML and read it."""
    write_sheet(prepared, path, count, seed)
    return Page(path.read_text(encoding="utf-8"))


def thumbnail(data: bytes, side: int = SIDE) -> Image.Image:
    """Return an encoded image with its longer side shrunk to `side`, made in another way than the sheet makes it."""
    whole = Image.fromarray(decode(data).permute(1, 2, 0).numpy())
    scale = min(1.0, side / max(whole.size))
    return whole.resize((max(1, round(whole.width * scale)), max(1, round(whole.height * scale))))


def close(a: Image.Image, b: Image.Image, tolerance: float) -> bool:
    """Whether two pictures have the same size, and differ by `tolerance` of 255 at most on average."""
    difference = (
        np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)) if a.size == b.size else 255
    )
    return float(np.mean(difference)) < tolerance


def test_the_page_shows_what_a_run_sees_first(prepared: Prepared, tmp_path: Path) -> None:
    found = page(prepared, tmp_path / "sheet.html", 10, seed=5)
    assert found.tags.count("figure") == 10
    samples = prepared.source.order(5).samples(np.arange(10)).tolist()
    for position, sample in enumerate(samples):
        texts = found.texts(position)
        if sample in BROKEN:
            assert any(text.startswith("no image, it begins with") for text in texts)
            assert not found.pictures(position)
            continue
        document = prepared.source.document(sample, key(5, position))
        data = document.images[0]
        width, height = SIZES[sample % 6]
        label = prepared.classes[document.meta["label"]]
        place = prepared.source.name(sample)
        size = f"{width} x {height}, {len(data) / 1000:,.1f} kB"
        others = [text for text in prepared.source.texts(sample) if text not in document.texts]
        assert texts == [document.texts[0], label, size, place.rsplit("/", 1)[-1], "1 more text", *others]
        assert place in found.titles and document.texts[0] in found.titles
        assert close(found.pictures(position)[0], thumbnail(data), 15)


def test_the_page_is_closed_in_itself_and_safe(prepared: Prepared, tmp_path: Path) -> None:
    page(prepared, tmp_path / "sheet.html")
    text = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "http" not in text and "<script" not in text and "url(" not in text
    assert set(re.findall(r'(?:src|href)="([^,]*),', text)) == {"data:", "data:image/webp;base64"}
    assert "&lt;script&gt;" in text and "漢字とかなの説明文" in text
    assert "24 of 24 samples" in text and f"data {prepared.hash()}" in text and "2 images cannot be decoded" in text


def test_seeds(prepared: Prepared, tmp_path: Path) -> None:
    for suffix in ("html", "png"):
        paths = [tmp_path / f"{name}.{suffix}" for name in "abc"]
        for path, seed in zip(paths, (1, 1, 2), strict=True):
            write_sheet(prepared, path, 5, seed)
        first, again, other = (path.read_bytes() for path in paths)
        assert first == again != other


def test_a_document_is_shown_in_reading_order(documents: Prepared, tmp_path: Path) -> None:
    found = page(documents, tmp_path / "sheet.html", 30)
    several = 0
    for position, sample in enumerate(documents.source.order(0).samples(np.arange(30)).tolist()):
        document = documents.source.document(sample, key(0, position))
        runs = [(tag, text) for tag, text in found.figures[position] if tag in ("p", "img")]
        expected: list[tuple[str, str]] = []
        for part in document.parts:
            if hasattr(part, "data"):
                expected.append(("img", ""))
            elif expected and expected[-1][0] == "p":
                expected[-1] = ("p", f"{expected[-1][1]} {part.value}")
            else:
                expected.append(("p", part.value))
        if len(document.parts) > 2:
            assert [(tag, text * (tag == "p")) for tag, text in runs] == expected
        several += len(document.images) > 1
        shown = zip(found.pictures(position), document.images, strict=True)
        assert all(close(picture, thumbnail(data), 15) for picture, data in shown)
    assert several > 3


def test_a_mixture(prepared: Prepared, documents: Prepared, tmp_path: Path) -> None:
    mixture = Mixture((prepared.source, documents.source), (1, 1), prepared.classes)
    found = page(Prepared(tmp_path, mixture), tmp_path / "sheet.html", 40)
    places = [title for title in found.titles if "#" in title and title.startswith("/")]
    expected = [mixture.name(i) for i in mixture.order(0).samples(np.arange(40)).tolist()]
    assert places == expected
    assert 10 < sum("a.tar" in place for place in places) < 30


def test_documents_as_pairs_show_one_image_and_its_sentence(documents: Prepared, tmp_path: Path) -> None:
    source = documents.source
    assert isinstance(source, Interleaves)
    pairs = Prepared(tmp_path, Interleaves(source.index, source.images, as_pairs=True))
    found = page(pairs, tmp_path / "sheet.html", 20)
    assert all(len(found.pictures(i)) == 1 for i in range(20))
    sample = source.order(0).sample(3)
    assert found.texts(3)[0] == pairs.source.document(sample, key(0, 3)).texts[0]
    assert f"{len(source.texts(sample)) - 1} more text" in " ".join(found.texts(3))


def test_the_picture_is_a_grid_of_thumbnails(prepared: Prepared, tmp_path: Path) -> None:
    write_sheet(prepared, tmp_path / "sheet.png", 24)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (GAP + COLUMNS * (SIDE + GAP), HEAD + 3 * (SIDE + BELOW + GAP))
    grey = sheet.getpixel((GAP + SIDE - 2, HEAD + 2))
    for position, sample in enumerate(prepared.source.order(0).samples(np.arange(24)).tolist()):
        left, top = GAP + position % COLUMNS * (SIDE + GAP), HEAD + position // COLUMNS * (SIDE + BELOW + GAP)
        square = sheet.crop((left, top, left + SIDE, top + SIDE))
        words = np.asarray(sheet.crop((left, top + SIDE, left + SIDE, top + SIDE + BELOW)).convert("L"))
        assert words.min() < 100, "there is a caption"
        margin = np.asarray(sheet.crop((left + SIDE, top, left + SIDE + GAP, top + SIDE + BELOW)))
        assert (margin == margin[0, 0]).all(), "nothing runs over"
        if sample in BROKEN:
            pixels = np.asarray(square).reshape(-1, 3)
            assert 0.8 < (pixels == grey).all(1).mean() < 1, "grey, with the reason"
            continue
        expected = thumbnail(prepared.source.document(sample, key(0, position)).images[0])
        x, y = (SIDE - expected.width) // 2, (SIDE - expected.height) // 2
        assert close(square.crop((x, y, x + expected.width, y + expected.height)), expected, 4)
        if expected.height < SIDE - 20:
            assert square.getpixel((SIDE // 2, 2)) == square.getpixel((SIDE // 2, SIDE - 3)) == grey


@pytest.mark.parametrize(("text", "drawn"), [("漢字 and かな字", "… and …"), ("Bär, café", "Bar, cafe"), ("قطة", "…")])
def test_characters_that_the_font_lacks(
    text: str, drawn: str, tmp_path: Path, picture: Picture, write_tar: WriteTar
) -> None:
    below = []
    for name, words in (("a", text), ("b", drawn)):
        write_tar(tmp_path / f"{name}.tar", {"0.png": picture(), "0.txt": words.encode()})
        write_sheet(Prepared(tmp_path, read_pairs(str(tmp_path / f"{name}.tar"))), tmp_path / f"{name}.png")
        below.append(Image.open(tmp_path / f"{name}.png").crop((0, HEAD + SIDE, GAP + SIDE, HEAD + SIDE + BELOW)))
    assert close(*below, 1e-9)
    assert len(below[0].getcolors() or []) > 1, "something is drawn"


def test_the_picture_shows_all_images_of_a_document(documents: Prepared, tmp_path: Path) -> None:
    write_sheet(documents, tmp_path / "sheet.png", 60)
    sheet = Image.open(tmp_path / "sheet.png")
    checked = 0
    for position, sample in enumerate(documents.source.order(0).samples(np.arange(60)).tolist()):
        images = documents.source.document(sample, key(0, position)).images
        if not 1 < len(images) <= 4:
            continue
        checked += 1
        left, top = GAP + position % COLUMNS * (SIDE + GAP), HEAD + position // COLUMNS * (SIDE + BELOW + GAP)
        for number, data in enumerate(images):
            side = SIDE // 2
            x, y = left + number % 2 * side, top + number // 2 * side
            expected = thumbnail(data, side - 4)
            x, y = x + (side - expected.width) // 2, y + (side - expected.height) // 2
            assert close(sheet.crop((x, y, x + expected.width, y + expected.height)), expected, 16)
    assert checked > 5


def test_fewer_samples_than_asked_for(prepared: Prepared, tmp_path: Path) -> None:
    assert page(prepared, tmp_path / "sheet.html", 1000).tags.count("figure") == 24
    write_sheet(prepared, tmp_path / "one.png", 1)
    assert Image.open(tmp_path / "one.png").height == HEAD + SIDE + BELOW + GAP


def test_samples_that_cannot_be_read(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "data.csv").write_text("file,caption\nthere.png,some words\ngone.png,other <words>\n")
    (tmp_path / "there.png").write_bytes(picture())
    data = Prepared(tmp_path, read_pairs(str(tmp_path / "data.csv"), captions=("{caption}",)))
    found = page(data, tmp_path / "sheet.html")
    gone = next(texts for texts in map(found.texts, range(2)) if texts[0].startswith("there is no image 'gone.png'"))
    assert gone[1:] == ["data.csv#" + gone[1].rsplit("#")[1], "1 more text", "other <words>"]


def test_progress(prepared: Prepared, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_sheet(prepared, tmp_path / "sheet.png", 3, progress=lambda *at: seen.append(at))
    assert seen == [("drawing samples", done, 3) for done in (1, 2, 3)]


def test_mistakes(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("words")
    with pytest.raises(UserError, match=r"sheet\.jpg' .* name it \.html or \.png"):
        write_sheet(prepared, tmp_path / "sheet.jpg")
    with pytest.raises(UserError, match="0 samples"):
        write_sheet(prepared, tmp_path / "sheet.png", 0)
    for path in (tmp_path / "no" / "sheet.html", tmp_path / "folder.png", tmp_path / "file" / "sheet.png"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write_sheet(prepared, path, 2)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_sheet_that_is_there_stays_until_the_new_one_is_whole(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "sheet.html"
    path.write_text("old")
    write_sheet(prepared, path, 2)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]
