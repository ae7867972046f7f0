"""Clip-art pairs from the Open Clip Art Library: what people drew, and how they titled, described and tagged it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree

from .packages import Package
from .render import parse, picture_of
from .shards import Sample
from .split import content_hash, groups, is_plain, near_duplicates, split_by_hash

SIDE = 112
STARS = 12
PUBLIC_DOMAIN = "public-domain"


def build(package: Package, fonts: Package) -> tuple[list[Sample], list[str], list[int]]:
    """All samples in a fixed order, the split of each, and the near-duplicate group of each."""
    found: dict[str, Sample] = {}
    root = package.root / "usr/share/openclipart/svg"
    for path in _files(root):
        sample = _sample(path, path.relative_to(root), package, fonts.root)
        if sample is not None:
            found.setdefault(content_hash(sample.picture), sample)
    names, samples = list(found), list(found.values())
    group = groups(len(samples), near_duplicates([sample.picture for sample in samples]))
    return samples, split_by_hash(names, group, val=0.1, test=0.1), group


def _files(root: Path) -> list[Path]:
    """Every drawing once (links repeat a file in a second category), the generated stars thinned out evenly."""
    paths = sorted(path for path in root.rglob("*.svg") if not path.is_symlink())
    stars = [path for path in paths if path.match("shapes/stars/star_*step.svg")]
    dropped = set(stars) - {stars[i * len(stars) // STARS] for i in range(STARS)}
    return [path for path in paths if path not in dropped]


def _sample(path: Path, name: Path, package: Package, fonts: Path) -> Sample | None:
    """The sample of one file; None if it has no text, is not public domain by its own metadata, or shows nothing."""
    root = parse(path.read_bytes())
    about = _metadata(root)
    text = caption(about["title"], about["description"])
    if not text or not about.pop("public_domain"):
        return None
    picture = picture_of(root, SIDE, fonts)
    if picture is None or is_plain(picture):
        return None
    category = name.parent.as_posix()
    fields = {
        "label": category.partition("/")[0],
        "category": category,
        **about,
        "license": PUBLIC_DOMAIN,
        "source": f"{package.origin}/{name.as_posix()}",
    }
    return Sample(picture, text, fields)


def caption(title: str, description: str) -> str:
    """Title and description as one text; a description that repeats the title stands alone."""
    if not description or not title:
        return title or description
    return description if title.casefold() in description.casefold() else f"{title}. {description}"


def _metadata(root: etree._Element) -> dict[str, Any]:
    """Title, description, tags, author and whether the licence is public domain, from the RDF block of the file."""
    work = next(_named(root, "Work"), None)
    if work is None:
        return {"title": "", "description": "", "tags": [], "author": "", "public_domain": False}
    licence = "".join(str(value) for element in _named(work, "license") for value in element.attrib.values())
    subject = next(_named(work, "subject"), None)
    creator = next(_named(work, "creator"), None)
    return {
        "title": _text(next((child for child in work if _local(child) == "title"), None)),
        "description": _text(next(_named(work, "description"), None)),
        "tags": [] if subject is None else [tag for item in _named(subject, "li") if (tag := _text(item))],
        "author": _text(creator),
        "public_domain": "publicdomain" in licence.casefold().replace(" ", ""),
    }


def _named(element: etree._Element, name: str) -> Iterator[etree._Element]:
    """Descendants of this local name, whether or not their prefix was ever declared."""
    return (child for child in element.iter(etree.Element) if _local(child) == name)


def _local(element: etree._Element) -> str:
    """The name of an element without its prefix; comments have none."""
    return element.tag.rpartition("}")[2].rpartition(":")[2] if isinstance(element.tag, str) else ""


def _text(element: etree._Element | None) -> str:
    """All text below `element` on one line."""
    return "" if element is None else " ".join("".join(map(str, element.itertext())).split())
