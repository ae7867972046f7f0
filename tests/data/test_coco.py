"""The layout of COCO: what is read, what is left out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.coco import CocoImages, open_coco
from altsight.data.scenes import Scenes, run_lengths, write_coco

Table = dict[str, Any]

SQUARE = [[2.0, 3.0, 8.0, 3.0, 8.0, 9.0, 2.0, 9.0]]


def table() -> Table:
    """Two images of 20 x 30 pixels; two categories with gaps between their ids; one object."""
    names = {7: "a.png", 3: "b.png"}
    thing = {"id": 1, "image_id": 3, "category_id": 90, "bbox": [2, 3, 6, 6], "segmentation": SQUARE, "iscrowd": 0}
    return {
        "images": [{"id": number, "file_name": name, "height": 20, "width": 30} for number, name in names.items()],
        "categories": [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [thing],
    }


def opened(folder: Path, content: Table | str) -> CocoImages:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "s").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "s" / name)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations" / "instances_s.json").write_text(text)
    return open_coco(folder, "s")


def test_objects_go_to_their_images(tmp_path: Path) -> None:
    images = opened(tmp_path, table())
    assert images.classes == ("cat", "dog") and images.category_ids == (5, 90) and len(images) == 2
    first, second = (images.document(i, key(0, i)) for i in (0, 1))
    assert first.meta["instances"] == () and second.meta["size"] == (20, 30)
    (thing,) = second.meta["instances"]
    assert thing.label == 1 and thing.box == (2, 3, 6, 6)
    assert images.has_masks and second.images[0][:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["polygon", "plain", "packed"])
def test_masks_of_every_kind(tmp_path: Path, kind: str) -> None:
    want = np.zeros((20, 30), np.uint8)
    want[3:9, 2:8] = 1
    packed = coco_mask.encode(np.asfortranarray(want))
    kinds = {
        "polygon": SQUARE,
        "plain": {"size": [20, 30], "counts": run_lengths(want.astype(bool))},
        "packed": {"size": [20, 30], "counts": packed["counts"].decode()},
    }
    content = table()
    content["annotations"][0]["segmentation"] = kinds[kind]
    (thing,) = opened(tmp_path, content).instances[1]
    assert (thing.mask(20, 30) == want).all()


def test_crowds_and_empty_boxes_are_left_out(tmp_path: Path) -> None:
    content = table()
    content["annotations"] += [
        content["annotations"][0] | {"id": 2, "iscrowd": 1},
        content["annotations"][0] | {"id": 3, "bbox": [2, 3, 6, 0]},
    ]
    assert [len(things) for things in opened(tmp_path, content).instances] == [0, 1]


def test_scenes_are_read_back(tmp_path: Path) -> None:
    scenes = Scenes(3)
    write_coco(tmp_path / "coco", scenes, Scenes(2, seed=1))
    images = open_coco(tmp_path / "coco", "train2017")
    assert images.classes == scenes.names and len(open_coco(tmp_path / "coco", "val2017")) == 2
    for i, things in enumerate(images.instances):
        made = scenes.scene(i).things
        assert [(t.label, tuple(map(int, t.box))) for t in things] == [(t.label, t.box) for t in made]
        assert all((t.mask(96, 96) == m.mask).all() for t, m in zip(things, made, strict=True))


def changed(change: Callable[[Table], object]) -> Table:
    content = table()
    change(content)
    return content


WRONG: list[tuple[Table | str, str]] = [
    ("{", "is no JSON"),
    ("[]", "not in the layout of COCO"),
    (changed(lambda t: t.pop("categories")), "needs the lists"),
    (changed(lambda t: t["annotations"][0].pop("bbox")), "KeyError: 'bbox'"),
    (changed(lambda t: t["annotations"][0].update(image_id=4)), "annotation 1 .* is of the image 4, which is not"),
    (
        changed(lambda t: t["annotations"][0].update(category_id=1)),
        "annotation 1 .* is of the category 1, which is not",
    ),
    (changed(lambda t: t["annotations"][0].update(bbox=[25, 3, 10, 6])), "lies outside of its image of 30 x 20"),
    (changed(lambda t: t["annotations"][0].update(bbox=[float("nan"), 3, 1, 6])), "lies outside of its image of 30"),
    *(
        (changed(lambda t, c=c: t["annotations"][0].update(segmentation={"size": [20, 30], "counts": c})), "mask of")
        for c in ([599], None)
    ),
    (changed(lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3]])), "neither polygons nor run lengths"),
    (
        changed(lambda t: t["annotations"][0].update(segmentation={"size": [9, 9], "counts": [81]})),
        "run lengths of 20 x 30",
    ),
    (changed(lambda t: t["images"][0].update(id=3)), "lists the image 3 twice"),
    (changed(lambda t: t["categories"][0].update(id=90)), "lists a category twice"),
    (changed(lambda t: t["images"][0].update(file_name="c.png")), "1 of 2 images .* are missing"),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=[words[:24] for _, words in WRONG])
def test_damage_is_told_in_a_line(tmp_path: Path, content: Table | str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        opened(tmp_path, content)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_coco(tmp_path, "train2017")
