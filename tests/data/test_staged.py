"""Preparation by stages: which stage a sample is in, smaller and augmented crops, patch dropout."""

from __future__ import annotations

import io
import pickle
import random
from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from altsight.core.rng import Key, key
from altsight.core.types import Document, Example, Image
from altsight.data.multicrop import ViewConfig
from altsight.data.shapes import Shapes
from altsight.data.staged import (
    PatchDropout,
    StageCrop,
    Staged,
    lanczos,
    rand_augment,
    stage_crop,
    with_own_crops,
)
from altsight.data.views import Crop, crops, low_frequency_crop, normalize
from altsight.methods.two_views import TwoViews

AT = key(3, 17)


@dataclass(frozen=True)
class Marked:
    """Says which preparation it was."""

    mark: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        return {"mark": torch.tensor(self.mark)} if document.id else None


def photo(height: int = 90, width: int = 120, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_the_stage_is_that_of_the_position() -> None:
    staged = pickle.loads(pickle.dumps(Staged((0, 32, 96), (Marked(0), Marked(1), Marked(2)))))
    document = Document((), "x")
    found = [staged(document, key(0, p))["mark"].item() for p in (0, 31, 32, 95, 96, 10**9)]
    assert found == [0, 0, 1, 1, 2, 2]
    assert staged(Document((), ""), AT) is None


def test_patch_dropout_adds_sorted_distinct_patches() -> None:
    prepare = pickle.loads(pickle.dumps(PatchDropout(Marked(1), 16, 0.6)))
    found = [prepare(Document((), "x"), key(0, p))["visible"] for p in range(200)]
    assert all(v.dtype == torch.int64 and v.tolist() == sorted(set(v.tolist())) and len(v) == 6 for v in found)
    counts = torch.cat(found).bincount(minlength=16)
    # Each patch is kept with probability 6/16, in 200 draws; five standard deviations.
    assert (counts - 75).abs().max() < 5 * (200 * 6 / 16 * 10 / 16) ** 0.5
    assert torch.equal(prepare(Document((), "x"), key(0, 5))["visible"], found[5])
    assert prepare(Document((), ""), AT) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_for_the_spectrum_crop_the_view_is_the_one_at_full_size(kind: str) -> None:
    crop, data = Crop(), photo(kind=kind)
    staged = stage_crop(crop, 32, 16, "low_frequency", None)
    assert torch.equal(staged(data, 16, AT), crop(data, 32, AT))
    # Local views of multi-crop have another side and stay as they are, beside a global one.
    both = crops(data, [(staged, 16, AT), (staged, 8, AT.child("local"))])
    assert both[1].shape == (3, 8, 8)
    alone = crops(data, [(crop, 32, AT), (crop, 8, AT.child("local"))])
    assert all(map(torch.equal, both, alone))


def test_resized_views_are_close_to_the_spectrum_crop() -> None:
    """Lanczos is about the same filter: closer to the spectrum's crop than taking every other pixel is."""
    data, crop = Shapes(1, pixels=64).image(0), Crop(scale=(1, 1), ratio=(1, 1), flip=False)
    full = crop(data, 64, AT)
    view = stage_crop(crop, 64, 32, "resize", None)(data, 32, AT)
    assert view.shape == (3, 32, 32) and view.dtype == torch.uint8
    expected = PIL.Image.fromarray(full.permute(1, 2, 0).numpy()).resize((32, 32), PIL.Image.Resampling.LANCZOS)
    assert torch.equal(view.permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    filtered = low_frequency_crop(full[None].float(), 32)[0]
    assert (view - filtered).abs().mean() < 0.5 * (full[:, ::2, ::2] - filtered).abs().mean()


def test_augmentation_follows_the_key_and_leaves_global_generators_alone() -> None:
    view = Crop()(photo(), 32, AT)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = rand_augment(view, 9, AT)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.random.get_rng_state(), before[2])
    random.seed(6)
    assert torch.equal(rand_augment(view, 9, AT), first) and first.shape == view.shape and first.dtype == torch.uint8
    others = [rand_augment(view, 9, key(3, p)) for p in range(20)]
    assert len({o.numpy().tobytes() for o in others}) > 10


def test_augmentation_grows_with_the_magnitude() -> None:
    view = Crop()(photo(), 32, AT)

    def change(magnitude: int) -> float:
        drawn = [rand_augment(view, magnitude, key(0, p)).float() for p in range(150)]
        return float(torch.stack([(d - view).abs().mean() for d in drawn]).mean())

    assert change(1) < 0.9 * change(9)


def test_the_augmented_crop_is_augmented_at_full_size_and_then_made_small() -> None:
    crop, data = Crop(), photo()
    whole = rand_augment(crop(data, 32, AT), 7, AT)
    assert torch.equal(stage_crop(crop, 32, 16, "low_frequency", 7)(data, 16, AT), whole)
    assert torch.equal(stage_crop(crop, 32, 16, "resize", 7)(data, 16, AT), lanczos(whole, 16))
    assert torch.equal(stage_crop(crop, 32, 32, "resize", 7)(data, 32, AT), whole)


def test_crops_of_a_method_s_own_are_found_and_kept_at_full_size() -> None:
    shared = stage_crop(Crop(), 32, 16, "low_frequency", 3)
    prepare = TwoViews(ViewConfig(), ViewConfig(crop=shared), 16)
    changed = with_own_crops(prepare, 32, 16)
    assert isinstance(changed, TwoViews)
    assert changed.first.crop == stage_crop(ViewConfig().crop, 32, 16, "low_frequency", None)
    assert changed.second is prepare.second and isinstance(changed.second.crop, StageCrop)
    assert changed.first.colour is prepare.first.colour
    example = changed(Document((Image(photo()),), "x"), AT)
    assert example is not None and example["image"].shape == (2, 3, 32, 32)
    plain = TwoViews(ViewConfig(), ViewConfig(), 32)(Document((Image(photo()),), "x"), AT)
    assert plain is not None and torch.equal(example["image"][0], plain["image"][0])
    assert with_own_crops(Marked(1), 32, 16) == Marked(1)
    assert with_own_crops((Crop(), 5), 32, 16)[0].full == 32


def test_normalised_full_views_make_the_same_small_ones_as_the_crop_of_the_spectrum() -> None:
    view: Tensor = Crop()(photo(), 32, AT)
    small = low_frequency_crop(normalize(view[None], "imagenet"), 16)
    assert small.shape == (1, 3, 16, 16) and torch.allclose(small.mean(), normalize(view[None], "imagenet").mean())
