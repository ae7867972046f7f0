"""Images with boxes and masks in the layout of COCO: a folder of images and a JSON file of instances.

Lin et al. 2014, "Microsoft COCO". It is checked when it is opened, so that nothing fails in the middle of a run.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from altsight.core.config import read_json
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document, Image
from altsight.data.cache import Cache
from altsight.data.decode import BrokenImage
from altsight.data.order import Order

Masks = npt.NDArray[np.uint8]

TOLERANCE = 1.0
"""Pixels by which a box may reach beyond its image: annotators' boxes are rounded."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the set: its id there, its file, and its size in pixels."""

    id: int
    file: Path
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One object. label: place of its category among `CocoImages.classes`. box: left, top, width, height in pixels.

    segmentation: polygons [[x, y, x, y, ...], ...], or run lengths {"size", "counts"}, plain or packed; None: none.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: Any

    def mask(self, height: int, width: int) -> Masks:
        """Return the mask (height, width), 0 or 1, in an image of this size."""
        api, coded = mask_api(), self.segmentation
        if isinstance(coded, list):
            coded = api.merge(api.frPyObjects(coded, height, width))
        elif isinstance(coded["counts"], list):
            coded = api.frPyObjects(coded, height, width)
        found: Masks = api.decode(coded)
        return found


@dataclass(frozen=True)
class CocoImages:
    """A source of images with the objects in them; see `altsight.data.sources.Source`.

    meta of a document: `instances`, a tuple of `Instance` without crowds and boxes without an area; `size`, height and
    width as annotated. category_ids: the set's own id of every class.
    """

    pictures: tuple[Picture, ...]
    instances: tuple[tuple[Instance, ...], ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotations: Path

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def is_remote(self) -> bool:
        """False: the images lie on disk."""
        return False

    def document(self, i: int, at: Key) -> Document:
        """Return image `i` and its objects; BrokenImage where it cannot be read."""
        picture = self.pictures[i]
        meta = {"instances": self.instances[i], "size": (picture.height, picture.width)}
        return Document((Image(self.image(i)),), self.name(i), meta)

    def image(self, i: int) -> bytes:
        """Return the encoded image `i`; BrokenImage where it cannot be read."""
        try:
            return self.pictures[i].file.read_bytes()
        except OSError as error:
            raise BrokenImage(error.strerror or type(error).__name__) from None

    def name(self, i: int) -> str:
        """Return the file of image `i`."""
        return str(self.pictures[i].file)

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Boxes are no text to learn from."""
        return []

    def parts(self) -> dict[str, int]:
        """Return the number of images in the one part that there is."""
        return {str(self.annotations): len(self)}

    def cached(self, cache: Cache | None) -> CocoImages:
        """Return itself: nothing is remote."""
        return self

    @functools.cached_property
    def has_masks(self) -> bool:
        """True if every object has a mask."""
        return all(thing.segmentation is not None for things in self.instances for thing in things)


def open_coco(root: Path, split: str) -> CocoImages:
    """Open the images in ROOT/SPLIT with ROOT/annotations/instances_SPLIT.json.

    Raises:
        UserError: a file is missing or damaged, or an annotation names an image or a category that is not there, or
            has a box that lies outside of its image.
    """
    path, folder = root / "annotations" / f"instances_{split}.json", root / split
    data = read_json(path)
    tables = [data.get(name) if isinstance(data, dict) else None for name in ("images", "annotations", "categories")]
    if not all(isinstance(table, list) and table for table in tables):
        raise UserError(
            f"'{path}' is not in the layout of COCO: it needs the lists images, annotations and categories."
        )
    images, annotations, categories = tables
    assert images and annotations and categories
    try:
        pictures = tuple(_picture(row, folder) for row in images)
        names = {int(row["id"]): str(row["name"]) for row in categories}
        _check_pictures(pictures, len(categories) - len(names), path)
        places = {picture.id: place for place, picture in enumerate(pictures)}
        labels = {category: label for label, category in enumerate(names)}
        things: list[list[Instance]] = [[] for _ in pictures]
        for row in annotations:
            if (image := row["image_id"]) not in places:
                raise UserError(f"annotation {row['id']} in '{path}' is of the image {image}, which is not listed.")
            if row["category_id"] not in labels:
                raise UserError(
                    f"annotation {row['id']} in '{path}' is of the category {row['category_id']}, which is not listed."
                )
            thing = _instance(row, labels, pictures[places[image]], path)
            if thing is not None:
                things[places[image]].append(thing)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is not in the layout of COCO ({type(error).__name__}: {error}): mend it.") from None
    return CocoImages(pictures, tuple(map(tuple, things)), tuple(names.values()), tuple(names), path)


def _picture(row: dict[str, Any], folder: Path) -> Picture:
    return Picture(int(row["id"]), folder / row["file_name"], int(row["height"]), int(row["width"]))


def _check_pictures(pictures: tuple[Picture, ...], twice: int, path: Path) -> None:
    if twice:
        raise UserError(f"'{path}' lists a category twice: every category needs an id of its own.")
    ids, times = Counter(picture.id for picture in pictures).most_common(1)[0]
    if times > 1:
        raise UserError(f"'{path}' lists the image {ids} twice: every image needs an id of its own.")
    missing = [picture.file for picture in pictures if not picture.file.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(pictures)} images of '{path}' are missing, such as '{missing[0]}'.")


def _instance(row: dict[str, Any], labels: dict[int, int], picture: Picture, path: Path) -> Instance | None:
    """Return the object of an annotation; None for a crowd, and for a box without an area."""
    left, top, width, height = map(float, row["bbox"])
    right, bottom = left + width, top + height
    edges = (-left, -top, right - picture.width, bottom - picture.height)
    # A box that is no number is not inside either.
    if not all(edge <= TOLERANCE for edge in edges):
        raise UserError(
            f"the box {row['bbox']} of annotation {row['id']} in '{path}' lies outside of its image of {picture.width} "
            f"x {picture.height} pixels: boxes are left, top, width, height."
        )
    if row.get("iscrowd") or min(width, height) <= 0:
        return None
    segmentation = row.get("segmentation") or None
    if segmentation is not None:
        _check_segmentation(segmentation, row["id"], picture, path)
    return Instance(labels[row["category_id"]], (left, top, width, height), segmentation)


def _check_segmentation(segmentation: Any, number: Any, picture: Picture, path: Path) -> None:
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], [picture.height, picture.width]
        whole = sum(counts) == size[0] * size[1] if isinstance(counts, list) else isinstance(counts, str)
        good = list(segmentation["size"]) == size and whole
    else:
        good = all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)
    if not good:
        raise UserError(
            f"the mask of annotation {number} in '{path}' is neither polygons nor run lengths of {picture.height} x "
            f"{picture.width} pixels."
        )


def mask_api() -> Any:
    """Return pycocotools' functions on run lengths; UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ModuleNotFoundError:
        raise UserError("masks of COCO need pycocotools: `pip install 'altsight[detection]'`.") from None
    return mask
