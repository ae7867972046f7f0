"""The same concepts drawn by three vendors, with clean names, keywords and subgroup labels: a transfer set."""

import json
from pathlib import Path
from typing import Any

from .packages import Package
from .render import parse, picture_of
from .shards import Sample
from .split import content_hash, groups, near_duplicates, split_by_label

SIDE = 64
GROUPS = {
    "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects"
}  # fmt: skip
GENDERED = ("2640", "2642")
MAN_OR_WOMAN = ("1F468", "1F469")
MIN_CONCEPTS = 5
# A vendor draws every face on the same disc: looser than this, all faces chain into one group.
SAME_DRAWING = 0.92


def build(vendors: list[Package], names: Package, fonts: Package) -> tuple[list[Sample], list[str], list[int]]:
    """All samples in a fixed order, the split of each, and the group (concept and near-duplicates) of each."""
    concepts = _concepts(names)
    drawings = {vendor.origin: _drawings(vendor) for vendor in vendors}
    concepts = [c for c in concepts if all(c["hexcode"] in known for known in drawings.values())]
    sizes = {c["label"]: sum(other["label"] == c["label"] for other in concepts) for c in concepts}
    concepts = [concept for concept in concepts if sizes[concept["label"]] >= MIN_CONCEPTS]

    samples = []
    for concept in concepts:
        for vendor in vendors:
            icon, svg = drawings[vendor.origin][concept["hexcode"]]
            picture = picture_of(parse(svg.encode()), SIDE, fonts.root)
            if picture is None:
                raise ValueError(f"{vendor.origin} draws nothing for {icon}.")
            about = _json(vendor.root / "info.json")
            origin = {
                "vendor": about["prefix"],
                "license": about["license"]["spdx"],
                "source": f"{vendor.origin}/{icon}",
            }
            samples.append(Sample(picture, concept["name"], concept | origin))

    same_concept = [(i, i + 1) for i in range(len(samples) - 1) if (i + 1) % len(vendors)]
    group = groups(len(samples), same_concept + near_duplicates([sample.picture for sample in samples], SAME_DRAWING))
    hashes = [content_hash(sample.picture) for sample in samples]
    labels = [sample.fields["label"] for sample in samples]
    return samples, split_by_label(hashes, group, labels, val=0.2, test=0.2), group


def _concepts(package: Package) -> list[dict[str, Any]]:
    """Things and people, without the skin-tone and gender variants that repeat a concept."""
    meta = _json(package.root / "meta/groups.json")
    german, french = (
        {e["hexcode"]: e["label"] for e in _json(package.root / lang / "data.json")} for lang in ("de", "fr")
    )
    concepts = []
    for entry in _json(package.root / "en/data.json"):
        code = entry["hexcode"]
        if meta["groups"].get(str(entry.get("group"))) not in GROUPS or _is_gendered(code):
            continue
        subgroup = meta["subgroups"][str(entry["subgroup"])]
        concepts.append({
            "label": subgroup,
            "name": entry["label"],
            "keywords": entry.get("tags", []),
            "group": meta["groups"][str(entry["group"])],
            "subgroup": subgroup,
            "hexcode": code,
            "name_de": german[code],
            "name_fr": french[code],
        })  # fmt: skip
    return concepts


def _is_gendered(code: str) -> bool:
    """Whether the code is the man's or the woman's variant of a concept (man running, woman farmer)."""
    parts = code.split("-")
    return any(sign in parts for sign in GENDERED) or (len(parts) > 1 and parts[0] in MAN_OR_WOMAN)


def _drawings(vendor: Package) -> dict[str, tuple[str, str]]:
    """hexcode -> (icon name, svg)."""
    icons = _json(vendor.root / "icons.json")
    drawings = {}
    for code, name in _json(vendor.root / "chars.json").items():
        if icon := icons["icons"].get(name):
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
            drawings[code.upper()] = (name, svg)
    return drawings


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
