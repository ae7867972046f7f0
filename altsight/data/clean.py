"""What known tokenizers make of a text before they cut it into tokens, and how they frame the ids."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from altsight.core.errors import UserError

Clean = Literal["none", "lower", "whitespace", "canonicalize", "letters"]
Special = Literal["text", "anywhere", "words"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextRules:
    """What a tokenizer does around its vocabulary; the defaults are those of the toolkit's own."""

    clean: Clean = "none"
    """none; lower, whitespace: OpenCLIP's repair of encodings and HTML, white space collapsed, lower-cased or not;
    canonicalize: that repair, then no punctuation (OpenCLIP's SigLIP); letters: no punctuation, without the repair
    (that of transformers)."""
    start: bool = True
    """A text begins with the start token (SigLIP: not)."""
    pad_left: bool = False
    """Padding comes before the text."""
    special: Special = "text"
    """What the name of a special token in a text is: text; the token, anywhere (transformers); or the token, where the
    name is a word of its own (OpenCLIP)."""


def cleaner(name: Clean) -> Callable[[str], str]:
    """Return the function from text to cleaned text called `name`.

    Raises:
        UserError: it takes a library that is not installed.
    """
    if name in ("lower", "whitespace", "canonicalize"):
        _need_ftfy()
    return _CLEANERS[name]


def _need_ftfy() -> None:
    try:
        import ftfy  # noqa: F401
    except ImportError:
        raise UserError(
            "texts for an OpenCLIP model are cleaned by the library ftfy: `pip install 'altsight[openclip]'`."
        ) from None


def _repaired(text: str) -> str:
    """Return the text with broken encodings and doubly escaped HTML put right."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _canonical(text: str) -> str:
    """Return big_vision's form: underscores are spaces, punctuation is gone, lower case."""
    return _collapsed(_repaired(text).replace("_", " ").translate(_PUNCTUATION).lower())


def _letters(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


_CLEANERS: dict[Clean, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": lambda text: _collapsed(_repaired(text)).lower(),
    "whitespace": lambda text: _collapsed(_repaired(text)),
    "canonicalize": _canonical,
    "letters": _letters,
}
