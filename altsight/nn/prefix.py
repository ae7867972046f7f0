"""Pictures as a prefix of a language model's text: patch tokens through an MLP, then the words.

LLaVA (Liu et al. 2023) and LCL's captioning protocol (specification LCL 2.8) read pictures this way. The language model
is any causal one of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.text import Tokenizer, load_tokenizer
from altsight.nn.init import reset


@dataclass(frozen=True)
class LanguageSize:
    """Size of a GPT-2 that starts from random weights."""

    width: int = 256
    heads: int = 4
    layers: int = 4


class Projector(nn.Module):
    """Patch tokens -> tokens for the language model: two linear maps with a GELU between them.

    Returns a list of one, (B, S, width): one level, where VisualGPT's decoder reads several.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`, as PyTorch does."""
        with torch_seeded(at):
            reset(self)

    def forward(self, patches: Tensor) -> list[Tensor]:
        return [self.layers(patches)]


class PrefixDecoder(nn.Module):
    """A causal language model of transformers that reads the tokens of a picture before the text. Dropout is off.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.vocab_size = model, tokenizer.vocab_size
        known = model.get_input_embeddings().num_embeddings
        if self.vocab_size > known:
            raise UserError(
                f"the tokenizer has {self.vocab_size:,} tokens and the language model only {known:,}: they do not "
                "belong together."
            )

    def train(self, mode: bool = True) -> PrefixDecoder:
        """Leave the language model in evaluation mode, in which it has no dropout; returns self."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def width(self) -> int:
        """Width of the tokens that it reads."""
        return int(self.model.get_input_embeddings().embedding_dim)

    def forward(self, ids: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Return next-token logits (B, T, V) for ids (B, T) behind the tokens of a picture, (B, S, width) in a list."""
        words = self.model.get_input_embeddings()(ids)
        x = torch.cat([*(level.to(words.dtype) for level in levels), words], dim=1)
        logits: Tensor = self.model(inputs_embeds=x, use_cache=False, logits_to_keep=ids.shape[1]).logits
        # Some models have more rows than their tokenizer has tokens.
        return logits[..., : self.vocab_size]


def new_language_model(size: LanguageSize, tokenizer: Tokenizer, length: int, at: Key) -> Any:
    """Return a GPT-2 that reads `length` tokens, with random weights from `at`.

    Raises:
        UserError: the width is not divisible by the number of heads.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    check_size(size)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=length,
        n_embd=size.width,
        n_head=size.heads,
        n_layer=size.layers,
        bos_token_id=tokenizer.start,
        eos_token_id=tokenizer.end,
    )
    with torch_seeded(at):
        return GPT2LMHeadModel(config)


def check_size(size: LanguageSize) -> None:
    """Raise UserError if the width is not divisible by the number of heads."""
    if size.width % size.heads:
        raise UserError(
            f"a language model {size.width} wide has no {size.heads} equal heads: change --size.width or --size.heads."
        )


def load_language_model(name: str, length: int) -> Any:
    """Return a causal language model of transformers, by its folder or its name on the hub, in fp32.

    length: tokens that it must be able to read, those of the picture included.

    Raises:
        UserError: there is none, or it reads shorter texts only.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the language model '{name}' cannot be loaded ({reason}): give --language-model the folder of a causal "
            "one, as transformers saves it, or leave it away for a small one from random weights."
        ) from None
    longest = getattr(model.config, "max_position_embeddings", length)
    if length > longest:
        raise UserError(
            f"the language model '{name}' reads {longest} tokens at most, and a caption with its picture has {length}: "
            "lower --length, or use another model."
        )
    return model.float()


def language_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a language model: tokenizer.json in its folder, or the one of its name on the hub.

    Raises:
        UserError: there is none.
    """
    file = Path(name) / "tokenizer.json"
    if Path(name).is_dir() and not file.is_file():
        raise UserError(f"the language model '{name}' has no tokenizer.json: save its tokenizer beside it.")
    return load_tokenizer(str(file) if file.is_file() else name)
