"""CIDEr-D by its definition."""

from __future__ import annotations

import pytest

from altsight.core.errors import UserError
from altsight.evals.captions import cider

REFERENCES = [
    ["a red fox runs over the snow"],
    ["two children play chess in a garden"],
    ["the old harbour seen from above at night"],
    ["bread and cheese lie on wooden boards"],
]


def test_the_only_reference_itself_scores_ten() -> None:
    """Specification E3.13."""
    assert cider([texts[0] for texts in REFERENCES], REFERENCES) == pytest.approx(10)


def test_case_and_punctuation_do_not_count() -> None:
    shouted = [texts[0].upper() + "!" for texts in REFERENCES]
    assert cider(shouted, REFERENCES) == pytest.approx(10)


def test_other_peoples_captions_score_low() -> None:
    turned = [REFERENCES[(i + 1) % 4][0] for i in range(4)]
    assert cider(turned, REFERENCES) < 0.5


def test_words_that_every_image_shares_are_worth_nothing() -> None:
    """log(images / images that have it) = 0."""
    references = [[f"photo {texts[0]}"] for texts in REFERENCES]
    assert cider(["photo"] * 4, references) == pytest.approx(0)


def test_numbers_must_match() -> None:
    with pytest.raises(UserError, match="1 captions cannot be scored against 4"):
        cider(["a"], REFERENCES)
