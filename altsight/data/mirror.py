"""Captions of mirrored images: "left" and "right" change places (VirTex; specification 9.3)."""

from __future__ import annotations

import re

_SIDE = re.compile(r"\b(left|right)(?=(?:most|ward|wards|hand|handed|side)?\b)", re.IGNORECASE)
"""Whole words and their compounds. The rest of a word is left alone: "bright" and "copyright" name no side."""


def mirrored(text: str) -> str:
    """Return `text` as it reads of the mirrored image; lower case, Capitals and UPPER case stay as they are."""
    return _SIDE.sub(_other_side, text)


def _other_side(found: re.Match[str]) -> str:
    word = found.group()
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
