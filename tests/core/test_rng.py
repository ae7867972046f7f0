"""Randomness is a pure function of (seed, position, purpose), and looks random."""

from __future__ import annotations

import numpy as np
import torch

from altsight.core.rng import key, torch_seeded


def test_same_key_same_numbers_whatever_was_drawn_before() -> None:
    at = key(3, 10**12, "crop")
    first = at.generator().random(5)
    at.child("flip").generator().random(100)
    np.testing.assert_array_equal(first, key(3, 10**12, "crop").generator().random(5))


def test_every_part_of_the_key_matters() -> None:
    keys = [key(s, p, purpose) for s in (0, 1, -1) for p in (0, 1, 10, 11) for purpose in ("", "a", "b", "a/b")]
    assert len({k.integer() for k in keys}) == len(keys)


def test_seed_and_position_do_not_run_together() -> None:
    assert key(1, 11).integer() != key(11, 1).integer() != key(1, 1, "1").integer()


def test_child_is_named_by_its_path() -> None:
    assert key(0, 5, "view").child("crop").child("box") == key(0, 5, "view/crop/box")


def test_integer_has_63_bits() -> None:
    values = np.array([key(0, p).integer() for p in range(2000)], dtype=np.uint64)
    assert values.max() < 2**63
    for bit in range(63):
        share = ((values >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(2000), bit


def test_first_numbers_of_neighbouring_positions_are_uniform_and_independent() -> None:
    n = 3000
    crop = np.array([key(0, p, "crop").generator().random() for p in range(n)])
    flip = np.array([key(0, p, "flip").generator().random() for p in range(n)])
    counts = np.histogram(crop, bins=10, range=(0, 1))[0]
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(crop, flip)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(crop[:-1], crop[1:])[0, 1]) < 4 / np.sqrt(n)


def test_torch_seeded_draws_from_the_key_and_puts_the_state_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch_seeded(key(0, 0, "init")):
        first = torch.rand(3)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    with torch_seeded(key(0, 0, "init")):
        torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    with torch_seeded(key(0, 0, "dropout")):
        assert not torch.equal(torch.rand(3), first)
