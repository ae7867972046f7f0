"""Tokenizers of Hugging Face's transformers as a `Tokenizer`, and a `Tokenizer` as a folder of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, processors

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


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int, pad_with_end: bool = False) -> None:
    """Write `tokenizer` to `folder` so that transformers' AutoTokenizer gives the same ids, framed in the same way.

    A text that spells a special token is an exception: transformers always takes it for the token. OpenCLIP's repair of
    broken texts is left out, since OpenCLIP does it itself, and transformers cannot.

    Args:
        context: longest text in tokens.
        pad_with_end: the padding is the end token, whatever the tokenizer's own is.
    """
    from transformers import PreTrainedTokenizerFast

    rules, model = tokenizer.rules, tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
    names = {role: str(model.id_to_token(getattr(tokenizer, role))) for role in ("start", "end", "pad")}
    if rules.clean in ("letters", "canonicalize"):
        model.normalizer = _without_punctuation(model.normalizer, rules.clean == "canonicalize")
    elif rules.clean == "lower":
        spaces = [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        model.normalizer = normalizers.Sequence([*spaces, *([model.normalizer] if model.normalizer else [])])
    used = [names["start"], names["end"]] if rules.start else [names["end"]]
    special = [(name, model.token_to_id(name)) for name in used]
    model.post_processor = processors.TemplateProcessing(" ".join([*used[:-1], "$A", used[-1]]), special_tokens=special)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model,
        eos_token=names["end"],
        pad_token=names["end" if pad_with_end else "pad"],
        padding_side="left" if rules.pad_left else "right",
        model_max_length=context,
        **({"bos_token": names["start"]} if rules.start else {}),
    )
    fast.save_pretrained(folder)


def _without_punctuation(then: Any, underscores: bool) -> Any:
    """Return the normalizer that drops ASCII's punctuation, and goes on with `then`."""
    steps: list[Any] = [normalizers.Replace("_", " ")] if underscores else []
    steps += [normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), "")]
    steps += [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, *([then] if then is not None else [])])
