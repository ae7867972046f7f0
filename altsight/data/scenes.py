"""Made-up scenes: several stamps on a background, with the true masks, boxes, classes and a caption of each.

Every scene is a function of (seed, i). They are written in the layouts of ADE20K and COCO, so that what reads those
data sets can be tried and tested without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from altsight.core.config import write_json
from altsight.core.rng import Key, key
from altsight.data.folder import appears_whole
from altsight.data.stamps import COVERED, VENDORS, Pixels, Stamp, stamps_of

Mask = npt.NDArray[np.bool_]

NAMES = ("banana", "cactus", "eggplant", "fox", "red apple", "whale")
"""What the scenes show unless they are told: things that differ in shape and colour."""
QUALITY = 95
"""Of the JPEG files."""


@dataclass(frozen=True, eq=False)
class Thing:
    """One object of a scene.

    label: its place among the names. mask: (H, W), where it is seen. box: left, top, width and height of the mask.
    """

    label: int
    mask: Mask
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 (H, W, 3), and what is in it, from left to right."""

    picture: Pixels
    things: tuple[Thing, ...]
    caption: str

    @property
    def semantic(self) -> Pixels:
        """Class of every pixel, uint8 (H, W): 0 where nothing is, the label + 1 elsewhere."""
        found = np.zeros(self.picture.shape[:2], np.uint8)
        for thing in self.things:
            found[thing.mask] = thing.label + 1
        return found


@dataclass(frozen=True)
class Scenes:
    """`size` scenes of `pixels` x `pixels`; another seed gives other scenes.

    names: of the emoji of the training split that occur, which are the classes. vendors: whose drawings of them; a
    set with a vendor that another set lacks shows drawings that nobody has learned. objects: fewest and most of them.
    """

    size: int
    seed: int = 0
    pixels: int = 96
    names: tuple[str, ...] = NAMES
    vendors: tuple[str, ...] = VENDORS
    objects: tuple[int, int] = (1, 3)

    def __len__(self) -> int:
        return self.size

    def scene(self, i: int) -> Scene:
        """Return scene `i`: objects side by side, near ones before far ones where they meet.

        Raises:
            UserError: a vendor drew none of a name.
        """
        at = key(self.seed, i, "scenes")
        draw = at.generator()
        drawings = stamps_of(self.names, self.vendors)
        count = int(draw.integers(self.objects[0], self.objects[1] + 1))
        labels = draw.integers(len(self.names), size=count)
        chosen = [drawings[label][int(draw.integers(len(drawings[label])))] for label in labels]
        picture = _background(self.pixels, at.child("background"))
        owner = np.full(picture.shape[:2], -1)
        for number in draw.permutation(count):
            _paste(picture, owner, chosen[number], int(number), count, draw)
        # One that others hide is not there.
        things = tuple(_thing(int(labels[n]), owner == n) for n in range(count) if (owner == n).any())
        return Scene(picture.round().astype(np.uint8), things, caption([self.names[t.label] for t in things]))


def caption(names: list[str]) -> str:
    """Return what a scene shows from left to right: "a fox left of an eggplant"."""
    return " left of ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)


def write_ade20k(folder: Path | str, training: Scenes, validation: Scenes) -> None:
    """Write scenes in the layout of ADE20K; `folder` appears whole, in place of one that was there.

    images/{training,validation}/*.jpg, annotations/{training,validation}/*.png (0: nothing, k: class k of the list),
    and classes.txt, a name a line.

    Raises:
        UserError: the folder cannot be written.
    """
    with appears_whole(Path(folder)) as part:
        for split, scenes in (("training", training), ("validation", validation)):
            images, masks = part / "images" / split, part / "annotations" / split
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(len(scenes)):
                scene = scenes.scene(i)
                PIL.Image.fromarray(scene.picture).save(images / f"{i:06}.jpg", quality=QUALITY)
                PIL.Image.fromarray(scene.semantic).save(masks / f"{i:06}.png")
        (part / "classes.txt").write_text("".join(f"{name}\n" for name in training.names), encoding="utf-8")


def write_coco(folder: Path | str, training: Scenes, validation: Scenes) -> None:
    """Write scenes in the layout of COCO; `folder` appears whole, in place of one that was there.

    {train,val}2017/*.jpg, annotations/instances_{train,val}2017.json with masks as uncompressed run lengths, and
    annotations/captions_{train,val}2017.json. Categories are numbered from 1.

    Raises:
        UserError: the folder cannot be written.
    """
    with appears_whole(Path(folder)) as part:
        (part / "annotations").mkdir()
        for split, scenes in (("train2017", training), ("val2017", validation)):
            (part / split).mkdir()
            images, instances, captions = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
            for i in range(len(scenes)):
                scene, name = scenes.scene(i), f"{i:012}.jpg"
                PIL.Image.fromarray(scene.picture).save(part / split / name, quality=QUALITY)
                images.append({"id": i, "file_name": name, "height": scenes.pixels, "width": scenes.pixels})
                captions.append({"id": i, "image_id": i, "caption": scene.caption})
                instances += [
                    {"id": len(instances) + n, "image_id": i} | _coco(t) for n, t in enumerate(scene.things, 1)
                ]
            categories = [{"id": number, "name": name} for number, name in enumerate(scenes.names, start=1)]
            whole = {"images": images, "annotations": instances, "categories": categories}
            write_json(part / "annotations" / f"instances_{split}.json", whole)
            write_json(part / "annotations" / f"captions_{split}.json", {"images": images, "annotations": captions})


def _background(pixels: int, at: Key) -> npt.NDArray[np.float32]:
    """Return a smooth field of colours with a little noise, fp32 (pixels, pixels, 3)."""
    draw = at.generator()
    coarse = PIL.Image.fromarray(draw.integers(60, 200, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((pixels, pixels), PIL.Image.Resampling.BICUBIC), np.float32)
    return (smooth + draw.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.float32)


def _paste(
    picture: npt.NDArray[np.float32],
    owner: npt.NDArray[np.int_],
    stamp: Stamp,
    number: int,
    count: int,
    draw: np.random.Generator,
) -> None:
    """Lay `stamp` into column `number` of `count` of the picture, and note in `owner` whose the pixels are now."""
    side = picture.shape[0]
    longer = round(side * draw.uniform(0.3, 0.45))
    rgba = stamp.sized(longer, flip=bool(draw.random() < 0.5))
    height, width = rgba.shape[:2]
    middle = side * (number + draw.uniform(0.4, 0.6)) / count
    left = int(np.clip(round(middle - width / 2), 0, side - width))
    top = int(draw.integers(side - height + 1))
    area = (slice(top, top + height), slice(left, left + width))
    alpha = rgba[..., 3:].astype(np.float32) / 255
    picture[area] = alpha * rgba[..., :3] + (1 - alpha) * picture[area]
    owner[area][rgba[..., 3] >= COVERED] = number


def _thing(label: int, mask: Mask) -> Thing:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return Thing(label, mask, (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top))


def _coco(thing: Thing) -> dict[str, Any]:
    """Return the annotation of one object, without its ids."""
    size = list(thing.mask.shape)
    return {
        "category_id": thing.label + 1,
        "bbox": list(thing.box),
        "area": int(thing.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": size, "counts": run_lengths(thing.mask)},
    }


def run_lengths(mask: Mask) -> list[int]:
    """Return COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(n) for n in np.diff(np.concatenate([[0], changes, [mask.size]]))]
