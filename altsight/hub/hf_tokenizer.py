"""Tokenizers of Hugging Face's transformers as a `Tokenizer`, and a `Tokenizer` as one of transformers."""

from __future__ import annotations

import json
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
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        theirs = AutoTokenizer.from_pretrained(name)
        if theirs.is_fast:
            return theirs
        reason = "it runs in Python only"
    except Exception as error:  # what a hub without a network, or a missing library, raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if (Path(name) / "tokenizer.json").is_file():
        # The folder's own class may need a library that this file does not.
        return PreTrainedTokenizerFast.from_pretrained(name)
    raise UserError(
        f"the tokenizer '{name}' cannot be loaded ({reason}): give a folder with tokenizer.json, or go online."
    )


def fast_tokenizer(tokenizer: Tokenizer, context: int, pad_with_end: bool = False) -> Any:
    """Return `tokenizer` as one of transformers that gives the same ids, framed in the same way.

    A text that spells a special token is an exception: transformers always takes it for the token. OpenCLIP's repair of
    broken texts is left out, since OpenCLIP does it itself, and transformers cannot.

    Args:
        context: longest text in tokens.
        pad_with_end: the padding is the end token, whatever the tokenizer's own is. So it is for OpenCLIP's tokenizer,
            which pads with the id of "!": transformers would take every "!" for padding.
    """
    from transformers import PreTrainedTokenizerFast

    rules, model = tokenizer.rules, tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
    names = {role: str(model.id_to_token(getattr(tokenizer, role))) for role in ("start", "end", "pad")}
    if rules.clean != "none":
        model.normalizer = _cleaned(rules.clean, model.normalizer)
    used = [names["start"], names["end"]] if rules.start else [names["end"]]
    frame = " ".join([*used[:-1], "$A", used[-1]])
    special = [(name, model.token_to_id(name)) for name in used]
    model.post_processor = processors.TemplateProcessing(frame, special_tokens=special)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model,
        eos_token=names["end"],
        pad_token=names["end" if pad_with_end or rules.special == "words" else "pad"],
        padding_side="left" if rules.pad_left else "right",
        model_max_length=context,
        **({"bos_token": names["start"]} if rules.start else {}),
    )


def swapped(tokenizer: Tokenizer, first: int, second: int) -> Tokenizer:
    """Return `tokenizer` with two ids changed for each other.

    Raises:
        UserError: its vocabulary has an order of its own.
    """
    other = {first: second, second: first}
    state = json.loads(tokenizer.model.to_str())
    words = state["model"].get("vocab")
    if not isinstance(words, dict):
        raise UserError("transformers' CLIP needs another number for the end token, which this vocabulary cannot give.")
    state["model"]["vocab"] = {word: other.get(number, number) for word, number in words.items()}
    for token in state["added_tokens"]:
        token["id"] = other.get(token["id"], token["id"])
    pad, start, end = (other.get(token, token) for token in (tokenizer.pad, tokenizer.start, tokenizer.end))
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), pad, start, end, tokenizer.rules)


def _cleaned(clean: Clean, then: Any) -> Any:
    """Return the normalizer that cleans a text, but for repairs, and goes on with `then`."""
    steps: list[Any] = [normalizers.Replace("_", " ")] if clean == "canonicalize" else []
    if clean in ("letters", "canonicalize"):
        steps.append(normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), ""))
    if clean != "whitespace":
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, *([] if then is None else [then])])
