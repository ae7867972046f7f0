"""Masks are read as ADE20K has them, views follow the image, and wrong folders are refused in one line."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Document, Image
from altsight.data.mask_views import MaskPrepare, MaskView, _saturated, distorted, fitted, mean_colour
from altsight.data.scenes import Scenes, write_ade20k
from altsight.data.segmentation import IGNORED, Masked, classes_of, read_masked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ade20k(tmp_path / "made", Scenes(3, pixels=40), Scenes(2, seed=1, pixels=40))
    return tmp_path / "made"


def opened(folder: Path, reduce_zero: bool = True) -> Masked:
    return read_masked(folder, "training", classes_of(folder), reduce_zero)


def test_zero_is_ignored_and_one_is_the_first_class(folder: Path) -> None:
    semantic = torch.from_numpy(Scenes(3, pixels=40).scene(1).semantic)
    expected = torch.where(semantic == 0, IGNORED, semantic.int() - 1)
    image, mask = opened(folder).sample(1)
    assert torch.equal(mask.int(), expected.int()) and image.shape == (3, 40, 40)


def test_without_that_zero_is_a_class(folder: Path) -> None:
    (folder / "classes.txt").write_text("background\n" + (folder / "classes.txt").read_text())
    mask = opened(folder, reduce_zero=False).mask(1)
    assert torch.equal(mask, torch.from_numpy(Scenes(3, pixels=40).scene(1).semantic))


def test_a_mask_may_itself_ignore(folder: Path) -> None:
    labels = np.array([[0, 1], [6, 255]], np.uint8)
    PIL.Image.fromarray(labels).save(folder / "annotations/training/000000.png")
    assert opened_masks(folder)[0].tolist() == [[IGNORED, 0], [5, IGNORED]]


def opened_masks(folder: Path) -> list[torch.Tensor]:
    files = tuple((p, folder / "annotations/training" / f"{p.stem}.png") for p in sorted(folder.glob("images/t*/*")))
    return [Masked("training", files, classes_of(folder)).mask(0)]


def test_views_keep_image_and_mask_together() -> None:
    # The image is its own mask: green where the mask is 1.
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[10:40, 20:60] = 1
    image = torch.stack([torch.zeros_like(mask), mask * 255, torch.zeros_like(mask)])
    view = MaskView(photometric=False, most_of_one=1.0)
    unflipped = MaskView(photometric=False, most_of_one=1.0, flip=False)
    black = torch.zeros(3, dtype=torch.uint8)
    flipped = 0
    for position in range(20):
        seen, labels = view(image, mask, 48, black, key(0, position))
        assert seen.shape == (3, 48, 48) and labels.shape == (48, 48)
        inside = labels != IGNORED
        agree = (seen[1] > 127) == (labels == 1)
        assert agree[inside].float().mean() > 0.97, "only edges differ: they are resized in two ways"
        assert (seen[1][~inside] == 0).all()
        again = view(image, mask, 48, black, key(0, position))
        assert torch.equal(again[0], seen) and torch.equal(again[1], labels)
        unflipped = MaskView(photometric=False, most_of_one=1.0, flip=False)
        flipped += not torch.equal(
            unflipped(image, mask, 48, torch.zeros(3, dtype=torch.uint8), key(0, position))[0], seen
        )
    assert 3 < flipped < 17


def test_crops_of_one_class_are_drawn_again() -> None:
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, 128:] = 1
    image = torch.zeros(3, 64, 256, dtype=torch.uint8)

    def varied(most: float) -> int:
        view = MaskView(scale=(1.0, 1.0), most_of_one=most, flip=False, photometric=False)
        cuts = [view(image, mask, 64, image[:, 0, 0], key(0, i))[1] for i in range(60)]
        return sum(0.25 < float((cut == 1).float().mean()) < 0.75 for cut in cuts)

    # Neither class has more than 3/4 at 31 of 193 places: a share of .16 for one crop, and 1 - .84^10 = .83 for ten.
    assert varied(0.0) < 22, "no crop is ever good enough, so the last one is as good as any"
    assert varied(0.75) > 40


def test_a_small_image_is_padded_with_the_mean_and_ignored() -> None:
    view = MaskView(scale=(0.5, 0.5), photometric=False, flip=False, most_of_one=1.0)
    prepare = MaskPrepare(view, 32, "imagenet")
    picture = Scenes(1, pixels=40).scene(0)
    file = io.BytesIO()
    PIL.Image.fromarray(picture.picture).save(file, "PNG")
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    example = prepare(Document((Image(file.getvalue()),), "x", {"mask": mask}), key(0, 0))
    assert example is not None
    outside = example["mask"] == IGNORED
    assert outside.sum() == 32 * 32 - 16 * 16
    assert (example["image"][:, outside] == mean_colour("imagenet")[:, None]).all()


def test_sizes_are_those_of_mmsegmentation() -> None:
    # (2048, 512) keeps the ratio and fits both: the shorter side is 512, unless the longer would pass 2048.
    assert fitted(torch.Size((480, 640)), 512) == (512, 683)
    assert fitted(torch.Size((100, 1000)), 512) == (205, 2048)
    assert fitted(torch.Size((480, 640)), 512, 2.0) == (1024, 1365)


def test_distortion_moves_colours_within_its_ranges() -> None:
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [float(distorted(grey, key(0, i))[0, 0, 0]) for i in range(300)]
    assert min(values) >= round(68 * 0.5) and max(values) <= 132 * 1.5
    unchanged = np.mean([value == 100 for value in values])
    assert 0.15 < unchanged < 0.35, "grey has no saturation and no hue: brightness and contrast are both off in 1 of 4"
    red = torch.zeros(3, 1, 1, dtype=torch.uint8)
    red[0] = 200
    hues = torch.stack([distorted(red, key(1, i))[:, 0, 0] for i in range(300)]).float()
    assert (hues[:, 0] >= hues[:, 1:].amax(dim=1)).all(), "a tenth of the circle leaves red the largest"
    assert (hues[:, 1:].amax(dim=1) > 0).float().mean() > 0.3


def test_saturation_scales_that_of_hsv() -> None:
    draw = key(0, 0, "colours").generator()
    for pixel in draw.integers(0, 256, (50, 3)):
        for factor in (0.5, 1.4):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
            expected = 255 * np.array(colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value))
            found = _saturated(torch.tensor(pixel).float().view(3, 1, 1), factor).flatten()
            assert np.allclose(found, expected, atol=1e-3)


def wrong_label(folder: Path) -> None:
    PIL.Image.fromarray(np.full((40, 40), 9, np.uint8)).save(folder / "annotations/training/000000.png")


def wrong_size(folder: Path) -> None:
    PIL.Image.fromarray(np.ones((40, 41), np.uint8)).save(folder / "annotations/training/000000.png")


def coloured(folder: Path) -> None:
    PIL.Image.new("RGB", (40, 40)).save(folder / "annotations/training/000000.png")


def damaged(folder: Path) -> None:
    (folder / "annotations/training/000000.png").write_bytes(b"no image")


def no_mask(folder: Path) -> None:
    (folder / "annotations/training/000001.png").unlink()


def no_image(folder: Path) -> None:
    (folder / "images/training/000001.jpg").unlink()


def broken_image(folder: Path) -> None:
    (folder / "images/training/000000.jpg").write_bytes(b"no image")


def no_folder(folder: Path) -> None:
    (folder / "images/training").rename(folder / "images/train")


def twice(folder: Path) -> None:
    (folder / "classes.txt").write_text("fox\nfox\n")


def no_classes(folder: Path) -> None:
    (folder / "classes.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_label, "000000.png' has the label 9, and there are 6 classes"),
        (wrong_size, "has 40 x 40 pixels and its mask 41 x 40"),
        (coloured, "has colours, not labels"),
        (damaged, "the mask '.*000000.png' cannot be read"),
        (no_mask, "000001.jpg' has no mask"),
        (no_image, "000001.png' has no image"),
        (broken_image, "000000.jpg' cannot be decoded"),
        (no_folder, "there is no folder '.*images/training'"),
        (twice, "names 'fox' twice"),
        (no_classes, "class file '.*classes.txt' cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_used_is_refused_in_one_line(folder: Path, spoil: object, message: str) -> None:
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        opened(folder)
    assert "\n" not in str(error.value)


def test_the_digest_follows_the_data(folder: Path) -> None:
    before = opened(folder).digest()
    assert before == opened(folder).digest()
    labels = Scenes(3, pixels=40).scene(0).semantic.copy()
    labels[:, ::2] = 1
    PIL.Image.fromarray(labels).save(folder / "annotations/training/000000.png")
    assert opened(folder).digest() != before


def test_ade20ks_own_table_of_classes(tmp_path: Path) -> None:
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert classes_of(tmp_path) == ("wall", "building")
    for damaged in (b"", b"\xff"):
        (tmp_path / "objectInfo150.txt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"the class file .*objectInfo150\.txt'"):
            classes_of(tmp_path)
    (tmp_path / "mine.txt").write_text("sky\n")
    assert classes_of(tmp_path, str(tmp_path / "mine.txt")) == ("sky",)
