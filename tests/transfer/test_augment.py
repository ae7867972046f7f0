"""Augmentation by key, against timm's own and against the formulas."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.data.shapes import Shapes
from altsight.transfer.augment import Augment, Mixing, rand_augment, random_erase, seeded

POLICY = "rand-m9-mstd0.5-inc1"


def picture(i: int = 0, size: int = 32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3, size, size), dtype=np.uint8))


def at(i: int) -> Key:
    return key(0, i, "test")


def next_numbers() -> tuple[float, float, float]:
    """Return what the global generators would yield next, without drawing it."""
    states: tuple[Any, Any, Any] = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = random.random(), float(np.random.random()), float(torch.rand(()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return found


def test_a_view_is_a_function_of_its_key_and_leaves_the_generators_alone() -> None:
    data = Shapes(1).image(0)
    before = next_numbers()
    views = [Augment()(data, 32, "half", at(i)) for i in (1, 2, 1)]
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])
    assert next_numbers() == before


def test_randaugment_is_that_of_timm() -> None:
    options = {"translate_const": 14, "img_mean": (128, 128, 128), "interpolation": PIL.Image.Resampling.BICUBIC}
    transform = rand_augment_transform(POLICY, options)
    changed = 0
    for i in range(40):
        with seeded(at(i).child("randaugment")):
            expected = np.array(transform(PIL.Image.fromarray(picture(i).permute(1, 2, 0).numpy())))
        found = rand_augment(picture(i), POLICY, "half", at(i))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(found, picture(i))
    assert changed > 20


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0-mstd0.5"])
def test_the_ends_of_the_range_can_be_drawn(policy: str) -> None:
    for i in range(200):
        rand_augment(picture(), policy, "imagenet", at(i))


def test_an_unknown_policy_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="no RandAugment policy 'wild'"):
        rand_augment(picture(), "wild", "half", at(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Augment(erase=7.0),
        lambda: Mixing(mixup=-1.0),
        lambda: Mixing(cutmix=-1.0),
        lambda: Mixing(switch=3.0),
        lambda: Mixing(probability=-0.1),
    ],
)
def test_numbers_out_of_range_are_said_in_one_line(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"(augment|mixing)\.\w+ is .*, not -?\d"):
        make()


def test_erasing_puts_noise_in_a_box() -> None:
    blank = torch.full((3, 64, 64), 7.0)
    erased = [random_erase(blank, 0.25, at(i)) for i in range(400)]
    touched = [image != 7 for image in erased if not torch.equal(image, blank)]
    assert 0.2 < len(touched) / 400 < 0.3
    shares = torch.tensor([float(where.double().mean()) for where in touched])
    assert shares.min() > 0.01 and shares.max() < 0.36
    noise = torch.cat([image[image != 7] for image in erased])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(blank, torch.full((3, 64, 64), 7.0))


def pair(i: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.zeros(classes)
    target[i % classes] = 1
    return torch.full((3, 16, 16), float(i)), target


def test_mixup_mixes_images_and_targets_by_the_same_share() -> None:
    for i in range(50):
        image, target = Mixing(0.8, 0.0)(pair(0), pair(1), at(i))
        share = float(target[0])
        assert torch.allclose(image, torch.full_like(image, 1 - share), atol=1e-6)
        assert torch.allclose(target, torch.tensor([share, 1 - share, 0]))


def test_cutmix_keeps_the_share_of_the_area_that_is_left() -> None:
    for i in range(50):
        image, target = Mixing(0.0, 1.0)(pair(0), pair(1), at(i))
        assert float(target[1]) == pytest.approx(float(image[0].mean()), abs=1e-6)
        rows, columns = (image[0] == 1).any(dim=1), (image[0] == 1).any(dim=0)
        assert rows.sum() * columns.sum() == (image[0] == 1).sum(), "what is pasted is a box"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_shares_are_distributed_as_those_of_timm(mixup: float, cutmix: float) -> None:
    ours = torch.stack([Mixing(mixup, cutmix)(pair(0, 2), pair(1, 2), at(i))[1][0] for i in range(1500)])
    timm = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=2)  # type: ignore[no-untyped-call]
    with seeded(at(0)):
        theirs = torch.stack([timm(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))[1][0, 0] for _ in range(1500)])
    quantiles = torch.linspace(0.05, 0.95, 10)
    # The standard error of a quantile is about 0.025 where the density is 0.5.
    torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles).float(), atol=0.08, rtol=0)


def test_the_probability_of_mixing() -> None:
    drawn = [Mixing(probability=0.3).draws(at(i)) for i in range(1000)]
    assert 0.25 < sum(drawn) / 1000 < 0.35
    assert not Mixing(0.0, 0.0).is_on and not Mixing(probability=0.0).draws(at(0))
