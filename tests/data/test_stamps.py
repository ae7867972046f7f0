"""Stamps are drawings without their background."""

from __future__ import annotations

import numpy as np
import pytest

from altsight.core.errors import UserError
from altsight.data.stamps import VENDORS, Stamp, cut_out, stamps, stamps_of


def test_white_around_a_drawing_goes_and_white_within_it_stays() -> None:
    image = np.full((12, 14, 3), 255, np.uint8)
    image[2:9, 3:11] = (200, 30, 30)
    image[4:6, 5:7] = 255  # an eye
    image[8, 10] = 255  # a bite out of the corner
    rgba = cut_out(image)
    assert rgba.shape == (7, 8, 4)
    assert (rgba[2:4, 2:4] == 255).all(), "the eye is white and opaque"
    expected = np.full((7, 8), 255)
    expected[-1, -1] = 0
    assert np.array_equal(rgba[..., 3], expected)


def test_every_vendor_drew_every_name() -> None:
    found = stamps("test")
    assert len(found) == 645
    names = {vendor: {s.name for s in found if s.vendor == vendor} for vendor in VENDORS}
    assert len(names[VENDORS[0]]) == 215 and all(names[v] == names[VENDORS[0]] for v in VENDORS)
    assert all((s.pixels[..., 3] == 255).mean() > 0 and set(np.unique(s.pixels[..., 3])) <= {0, 255} for s in found)


def test_a_stamp_is_scaled_without_a_white_rim() -> None:
    image = np.full((40, 40, 3), 255, np.uint8)
    image[4:36, 4:36] = (200, 30, 30)
    image[4:36, 30:36][::2] = 255
    half = Stamp(cut_out(image), "comb", "objects", "tool", "nobody").sized(17)
    assert half.shape == (17, 17, 4)
    rim = (half[..., 3] >= 32) & (half[..., 3] < 255)
    assert rim.any() and (abs(half[rim][:, :3].astype(int) - (200, 30, 30)) < 12).all(), "no white bleeds in"
    flipped = Stamp(cut_out(image), "comb", "objects", "tool", "nobody").sized(32, flip=True)
    assert np.array_equal(flipped[..., 3], cut_out(image)[:, ::-1, 3])


def test_unknown_names_and_splits() -> None:
    with pytest.raises(UserError, match=r"have no 'red aple'. Did you mean 'red apple'\?"):
        stamps_of(("red aple",))
    with pytest.raises(UserError, match="no sample data 'samples:emoji/valid'"):
        stamps("valid")
