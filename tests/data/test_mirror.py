"""Words for sides change places with the image, and only those."""

from __future__ import annotations

import pytest

from altsight.core.rng import key
from altsight.data.mirror import mirrored
from altsight.data.shapes import Shapes
from altsight.data.views import Crop


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat on the left of a dog", "a cat on the right of a dog"),
        ("left, then right; Left and RIGHT", "right, then left; Right and LEFT"),
        ("the leftmost cup, a right-hand glove", "the rightmost cup, a left-hand glove"),
        ("bright copyright leftover lefty fright", "bright copyright leftover lefty fright"),
        ("", ""),
    ],
)
def test_sides_change_places(text: str, expected: str) -> None:
    assert mirrored(text) == expected
    assert mirrored(expected) == text


def test_crop_says_whether_it_mirrors() -> None:
    data = Shapes(1).image(0)
    whole, plain = (Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip) for flip in (True, False))
    found = []
    for position in range(12):
        at = key(0, position)
        view, straight = whole(data, 32, at), plain(data, 32, at)
        assert not plain.flips(at)
        assert whole.flips(at) is bool((view == straight.flip(-1)).all())
        assert whole.flips(at) is not bool((view == straight).all())
        found.append(whole.flips(at))
    assert {True, False} == set(found)
