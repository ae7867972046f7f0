"""Made-up scenes tell the truth about themselves, and are written as ADE20K and COCO are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from altsight.core.errors import UserError
from altsight.data.scenes import NAMES, Scenes, run_lengths, write_ade20k, write_coco


def test_a_scene_is_a_function_of_seed_and_number() -> None:
    first, again, other = Scenes(4).scene(2), Scenes(9).scene(2), Scenes(4, seed=1).scene(2)
    assert np.array_equal(first.picture, again.picture) and first.caption == again.caption
    assert not np.array_equal(first.picture, other.picture)


def test_masks_boxes_and_captions_agree() -> None:
    scenes = Scenes(40, pixels=64, objects=(2, 5))
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        assert scene.picture.shape == (64, 64, 3)
        covered = np.zeros((64, 64), int)
        for thing in scene.things:
            left, top, width, height = thing.box
            inside = thing.mask[top : top + height, left : left + width]
            assert inside.sum() == thing.mask.sum(), "the box holds the whole mask"
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            covered += thing.mask
            assert (scene.semantic[thing.mask] == thing.label + 1).all()
        assert covered.max() == 1, "a pixel belongs to one object"
        assert ((covered == 0) == (scene.semantic == 0)).all()
        named = [name.split(" ", 1)[1] for name in scene.caption.split(" left of ")]
        assert named == [NAMES[thing.label] for thing in scene.things]


def test_objects_stand_out_from_the_background() -> None:
    scene = Scenes(1, pixels=96, names=("red apple",), objects=(1, 1)).scene(0)
    inside = scene.things[0].mask
    red = scene.picture[..., 0].astype(float) - scene.picture[..., 1]
    assert red[inside].mean() > red[~inside].mean() + 50


def test_ade20k_layout(tmp_path: Path) -> None:
    write_ade20k(tmp_path / "made", Scenes(3, pixels=32), Scenes(2, seed=1, pixels=32))
    assert (tmp_path / "made/classes.txt").read_text().split("\n")[:-1] == list(NAMES)
    assert len(list((tmp_path / "made/images/training").glob("*.jpg"))) == 3
    mask = np.asarray(PIL.Image.open(tmp_path / "made/annotations/validation/000001.png"))
    assert np.array_equal(mask, Scenes(2, seed=1, pixels=32).scene(1).semantic)


def test_coco_layout_as_pycocotools_reads_it(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    scenes = Scenes(3, pixels=32)
    write_coco(tmp_path / "made", scenes, Scenes(2, seed=1, pixels=32))
    read = coco.COCO(str(tmp_path / "made/annotations/instances_train2017.json"))
    assert [c["name"] for c in read.loadCats(read.getCatIds())] == list(NAMES)
    for i in range(3):
        things = scenes.scene(i).things
        annotations = read.loadAnns(read.getAnnIds(imgIds=[i]))
        assert [a["category_id"] - 1 for a in annotations] == [t.label for t in things]
        for annotation, thing in zip(annotations, things, strict=True):
            assert np.array_equal(read.annToMask(annotation), thing.mask)
            assert annotation["area"] == thing.mask.sum() and tuple(annotation["bbox"]) == thing.box
    captions = json.loads((tmp_path / "made/annotations/captions_val2017.json").read_text())["annotations"]
    assert captions[1]["caption"] == Scenes(2, seed=1, pixels=32).scene(1).caption


def test_run_lengths_begin_with_zeros() -> None:
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


def test_unknown_names_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'unicornn'"):
        write_ade20k(tmp_path / "made", Scenes(2, names=("unicornn",)), Scenes(1))
    assert not list(tmp_path.iterdir())
