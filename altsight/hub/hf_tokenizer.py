"""Tokenizers of Hugging Face's transformers as a `Tokenizer`: from a folder, or by name where there is a network."""

from __future__ import annotations

from typing import Any

import tokenizers

from altsight.core.errors import UserError
from altsight.data.clean import Clean, TextRules
from altsight.data.text import Tokenizer


def hf_tokenizer(name: str, clean: Clean = "none") -> Tokenizer:
    """Return the tokenizer in the folder `name`, or of that name on the Hugging Face hub.

    Special tokens, the side of the padding and whether a text has a start are the tokenizer's own; what its Python
    code does to a text besides has to be named.

    Args:
        clean: what happens to a text before the tokenizer's own rules.

    Raises:
        UserError: it cannot be loaded, or texts do not end in an end token.
    """
    theirs = _fetch(name)
    if not getattr(theirs, "is_fast", False):
        raise UserError(
            f"the tokenizer in '{name}' runs in Python only (it has no tokenizer.json): save the fast one of "
            "transformers."
        )
    framed, plain = (theirs("a b", add_special_tokens=special)["input_ids"] for special in (True, False))
    if framed[-1] != theirs.eos_token_id and framed[-1] != theirs.sep_token_id:
        raise UserError(f"the tokenizer in '{name}' does not end texts in an end token: use another model.")
    starts = len(framed) == len(plain) + 2
    pad = theirs.pad_token_id
    model = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    model.no_padding()
    model.no_truncation()
    rules = TextRules(clean, starts, theirs.padding_side == "left", "anywhere")
    first = framed[0] if starts else framed[-1]
    return Tokenizer(model, framed[-1] if pad is None else pad, first, framed[-1], rules)


def _fetch(name: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer '{name}' cannot be loaded ({reason}): give a folder with tokenizer.json, or connect to a "
            "network."
        ) from None
