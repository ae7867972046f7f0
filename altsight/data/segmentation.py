"""Images with a class for every pixel, in the layout of ADE20K: images/SPLIT and annotations/SPLIT, file by file."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document, Image
from altsight.data.cache import Cache
from altsight.data.decode import BrokenImage, decode
from altsight.data.listing import read_classes
from altsight.data.order import Order
from altsight.data.record import IMAGE_SUFFIXES

IGNORED = 255
"""Label of pixels that count neither in training nor in a score."""
OFFICIAL = "objectInfo150.txt"
"""Table of ADE20K's 150 classes, as it is distributed with the images."""
LOOKED_AT = 32
"""Masks that are looked at before anything is begun; the others when they are read."""


@dataclass(frozen=True)
class Masked:
    """One split of images with masks; a `Source`.

    files: (image, mask) of every sample. reduce_zero: a mask's 0 is ignored, and its k is class k - 1 (ADE20K); without
    it k is class k. 255 is ignored in any case.
    """

    split: str
    files: tuple[tuple[Path, Path], ...]
    classes: tuple[str, ...]
    reduce_zero: bool = True

    def __len__(self) -> int:
        return len(self.files)

    @property
    def is_remote(self) -> bool:
        """False: files lie on disk."""
        return False

    def document(self, i: int, at: Key) -> Document:
        """Return image `i`; meta holds its `mask`, uint8 (H, W) of classes and `IGNORED`.

        Raises:
            UserError: the mask cannot be used.
        """
        return Document((Image(self.files[i][0].read_bytes()),), self.name(i), {"mask": self.mask(i)})

    def mask(self, i: int) -> Tensor:
        """Return the mask of sample `i`, uint8 (H, W) of classes and `IGNORED`.

        Raises:
            UserError: it cannot be read, or has a label that is no class.
        """
        path = self.files[i][1]
        try:
            with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
                labels = np.array(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"the mask '{path}' cannot be read ({error}).") from None
        if labels.ndim != 2:
            raise UserError(f"the mask '{path}' has colours, not labels: save it as a grey or palette PNG of labels.")
        wrong = (labels > len(self.classes) - (not self.reduce_zero)) & (labels != IGNORED)
        if wrong.any():
            raise UserError(
                f"the mask '{path}' has the label {int(labels[wrong][0])}, and there are {len(self.classes)} classes: "
                "give the class file of these masks."
            )
        if self.reduce_zero:
            labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
        return torch.from_numpy(labels.astype(np.uint8))

    def sample(self, i: int) -> tuple[Tensor, Tensor]:
        """Return image, uint8 (3, H, W), and mask, uint8 (H, W), of sample `i`.

        Raises:
            UserError: either cannot be used, or they differ in size.
        """
        path = self.files[i][0]
        try:
            image = decode(path.read_bytes())
        except BrokenImage as error:
            raise UserError(f"the image '{path}' cannot be decoded ({error}).") from None
        mask = self.mask(i)
        check_size(image, mask, self.name(i))
        return image, mask

    def name(self, i: int) -> str:
        """Return the image's file."""
        return str(self.files[i][0])

    def order(self, seed: int) -> Order:
        """Return the order of a run under `seed`."""
        return Order(len(self), seed)

    def texts(self, i: int) -> list[str]:
        """Return nothing: there are no texts."""
        return []

    def parts(self) -> dict[str, int]:
        """Return the number of samples in the one part that there is."""
        return {self.split: len(self)}

    def cached(self, cache: Cache | None) -> Masked:
        """Return itself: files on disk are not kept elsewhere."""
        return self

    def digest(self) -> str:
        """Return 12 hex digits over classes, names and sizes of all files."""
        facts = [repr((self.split, self.classes, self.reduce_zero))]
        facts += [f"{path.name} {path.stat().st_size}" for pair in self.files for path in pair]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def check_size(image: Tensor, mask: Tensor, name: str) -> None:
    """Raise UserError if an image (3, H, W) and its mask (H, W) differ in size."""
    if image.shape[1:] != mask.shape:
        (high, wide), (rows, columns) = image.shape[1:], mask.shape
        raise UserError(
            f"the image '{name}' has {wide} x {high} pixels and its mask {columns} x {rows}: they must be of one size."
        )


def read_splits(folder: Path, classes: str = "", reduce_zero: bool = True) -> tuple[Masked, Masked]:
    """Return the training and the validation images of a folder in ADE20K's layout; `classes`: see `classes_of`.

    Raises:
        UserError: as `classes_of` and `read_masked`.
    """
    names = classes_of(folder, classes)
    return read_masked(folder, "training", names, reduce_zero), read_masked(folder, "validation", names, reduce_zero)


def read_masked(folder: Path, split: str, classes: Sequence[str], reduce_zero: bool = True) -> Masked:
    """Return a split of a folder in ADE20K's layout, after a look at some of its samples.

    Raises:
        UserError: a folder, an image or a mask is missing, or a mask that was looked at cannot be used.
    """
    images, masks = _files(folder / "images" / split), _files(folder / "annotations" / split)
    for there, missing, what in ((images, masks, "mask"), (masks, images, "image")):
        if alone := sorted(there.keys() - missing.keys()):
            raise UserError(f"'{there[alone[0]]}' has no {what}: every image needs a mask of its name.")
    found = Masked(split, tuple((images[stem], masks[stem]) for stem in sorted(images)), tuple(classes), reduce_zero)
    for i in range(0, len(found), max(len(found) // LOOKED_AT, 1)):
        found.sample(i)
    return found


def classes_of(folder: Path, file: str = "") -> tuple[str, ...]:
    """Return the class names of `file`, or of classes.txt or ADE20K's own objectInfo150.txt in the folder.

    Raises:
        UserError: there is no such file, it names a class twice, or more than a mask of bytes can tell apart.
    """
    official = folder / OFFICIAL
    if not file and official.is_file():
        return _official_names(official)
    names = tuple(read_classes(Path(file) if file else folder / "classes.txt"))
    if len(names) > IGNORED:
        raise UserError(f"{len(names)} classes are more than the {IGNORED} that a mask of bytes can hold.")
    return names


def _official_names(path: Path) -> tuple[str, ...]:
    """Return the first of each class's names, which stand in the last column of the table."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the class file '{path}' cannot be read ({error}).") from None
    names = tuple(re.split("[,;]", line.split("\t")[-1])[0].strip() for line in lines[1:] if line.strip())
    if not names:
        raise UserError(f"the class file '{path}' names no class.")
    return names


def _files(folder: Path) -> dict[str, Path]:
    """Return the images in a folder by their names without suffix."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder '{folder}': the layout of ADE20K is images/SPLIT and annotations/SPLIT, with an image "
            "and a mask of the same name."
        )
    found = {path.stem: path for path in folder.iterdir() if path.suffix[1:].lower() in IMAGE_SUFFIXES}
    if not found:
        raise UserError(f"there is no image in '{folder}'.")
    return found
