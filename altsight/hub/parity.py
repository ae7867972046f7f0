"""The check that every export passes: another library, loaded from what was written, computes the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.base import View

LIMIT = 1e-4
"""Largest difference of any number, in fp32, that an export may have."""
TEXTS = ("a photo of a dog", "", "Zwei Äpfel & ein Ei, 3.50 €", "word " * 200, "a drawing of a red flower \U0001f339")
"""Texts to compare: a plain one, none, one beyond ASCII, one that is cut, one with an emoji."""


def pictures(view: View, count: int = 3) -> Tensor:
    """Return fp32 images (count, 3, size, size) in [0, 1], noise of several scales, always the same."""
    random = torch.Generator().manual_seed(key(0, 0, "parity").integer())
    size = view.preprocess.size
    coarse = torch.rand(count, 3, 7, 7, generator=random)
    fine = torch.rand(count, 3, size, size, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (0.7 * smooth + 0.3 * fine).clamp(0, 1)


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference between two tensors; infinite where their shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.float() - theirs.float()).abs().max())


def check(differences: Mapping[str, float], library: str) -> None:
    """Raise UserError if one of `differences` is above `LIMIT`, or is no number."""
    for what, difference in differences.items():
        if not difference <= LIMIT:
            raise UserError(
                f"{library} computes other {what} from the export than Altsight does (they differ by {difference:.2g}, "
                f"and {LIMIT:g} is allowed), so nothing was written: export to another format."
            )
