"""How close captions are to their references: CIDEr-D, by the reference implementation (specification D11)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from altsight.core.errors import UserError


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the CIDEr-D of one candidate an image against that image's references, from 0 to 10.

    Scores depend on the whole set, since words count by their rarity among its references: never score it in parts.
    Words are lower-cased and stripped of punctuation here, where the official pipeline runs the PTB tokenizer (Java):
    close to, but not comparable with, published figures.

    Raises:
        UserError: pycocoevalcap is missing, or the numbers of candidates and references differ.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError:
        raise UserError("CIDEr needs pycocoevalcap: `pip install 'altsight[captions]'`.") from None
    if len(candidates) != len(references) or not candidates:
        raise UserError(f"{len(candidates)} captions cannot be scored against {len(references)} sets of references.")
    truth = {i: [_words(text) for text in texts] for i, texts in enumerate(references)}
    score, _ = Cider().compute_score(truth, {i: [_words(text)] for i, text in enumerate(candidates)})
    return float(score)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
