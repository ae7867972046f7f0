"""Mean IoU is torchmetrics'; windows cover every pixel; predictions of an image of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from altsight.data.segmentation import IGNORED
from altsight.evals.segmentation import Windows, ious, mean_iou, overlaps, pixel_accuracy

CLASSES = 5


def made(images: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return predictions and masks; class 3 is nowhere."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(images):
        mask = torch.from_numpy(draw.choice([0, 1, 2, 4, IGNORED], (9, 11)))
        guess = torch.where(torch.from_numpy(draw.random((9, 11)) < 0.6) & (mask != IGNORED), mask, torch.tensor(1))
        found.append((guess, mask))
    return found


def counted(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    return np.stack([overlaps(guess, mask, CLASSES) for guess, mask in pairs])


def test_mean_iou_is_that_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.classification")
    pairs = made()
    guess, mask = (torch.stack(part) for part in zip(*pairs, strict=True))
    options = {"num_classes": CLASSES, "ignore_index": IGNORED}
    jaccard = metrics.MulticlassJaccardIndex(average="macro", **options)(guess, mask)
    each = metrics.MulticlassJaccardIndex(average="none", **options)(guess, mask)
    accuracy = metrics.MulticlassAccuracy(average="micro", **options)(guess, mask)
    assert mean_iou(counted(pairs)).value == pytest.approx(float(jaccard), abs=1e-6)
    present = [0, 1, 2, 4]
    assert ious(counted(pairs).sum(axis=0))[present] == pytest.approx(each[present].numpy(), abs=1e-6)
    assert np.isnan(ious(counted(pairs).sum(axis=0))[3])
    assert pixel_accuracy(counted(pairs)).value == pytest.approx(float(accuracy), abs=1e-6)


def test_iou_from_sets() -> None:
    guess, mask = made(1)[0]
    for label in (0, 1, 2, 4):
        inside = mask != IGNORED
        both = ((guess == label) & (mask == label) & inside).sum()
        either = (((guess == label) | (mask == label)) & inside).sum()
        assert ious(overlaps(guess, mask, CLASSES))[label] == pytest.approx(float(both / either))


def test_the_interval_holds_the_value_and_narrows() -> None:
    few, many = mean_iou(counted(made(8))), mean_iou(counted(made(200)))
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_windows_are_where_mmsegmentation_has_them() -> None:
    windows = Windows(512, "imagenet")
    assert windows._starts(512) == [0] and windows._starts(683) == [0, 171]
    assert windows._starts(2048) == [0, 341, 682, 1023, 1364, 1536]


def test_a_pixel_is_the_mean_of_the_windows_that_see_it() -> None:
    image = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8)
    calls: list[Tensor] = []

    def logits(cut: Tensor) -> Tensor:
        calls.append(cut)
        # What a window says depends on the window, so that the mean is put to the test.
        return torch.stack([cut.float().mean(dim=(1, 2, 3)).view(-1, 1, 1) + cut[:, n].float() for n in (0, 1)], dim=1)

    found = Windows(24, "half")._slide(logits, image)[0]
    want, seen = torch.zeros(2, 24, 40), torch.zeros(24, 40)
    for left in (0, 16):
        cut = image[:, :, left : left + 24].float()
        want[:, :, left : left + 24] += cut.mean() + cut[:2]
        seen[:, left : left + 24] += 1
    torch.testing.assert_close(found, want / seen)
    assert sum(len(cut) for cut in calls) == 2


def test_a_prediction_has_the_size_of_its_image() -> None:
    def bright(cut: Tensor) -> Tensor:
        red = cut[:, 0].float() / 255
        return 20 * torch.stack([0.5 - red, red - 0.5], dim=1)

    image = torch.zeros(3, 30, 200, dtype=torch.uint8)
    image[0, :, 90:] = 255
    for windows in (Windows(32, "half"), Windows(32, "half", multi_scale=True)):
        found = windows.probabilities(bright, image)
        assert found.shape == (2, 30, 200)
        torch.testing.assert_close(found.sum(dim=0), torch.ones(30, 200))
        assert ((found.argmax(dim=0) == 1) == (image[0] > 0)).float().mean() > 0.98
    assert Windows(32, "half").preprocess().hash() != Windows(32, "half", multi_scale=True).preprocess().hash()
