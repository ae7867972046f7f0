"""Text towers from the `transformers` library: a BERT that starts from random weights, and pre-trained ones.

Both read the state of the first token, which the tokenizer puts before every text ([CLS]), without BERT's pooler, and
map it to the joint space. Padding is hidden from attention. The library is imported where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.text import Tokenizer, load_tokenizer
from altsight.nn.caption import is_text
from altsight.nn.init import fill, normal, reset
from altsight.nn.text import TextEncoder


@dataclass(frozen=True)
class BertTowerConfig:
    """Size of a BERT; the defaults are BERT-base's. Mini: 256 wide, 4 heads, 4 layers; large: 1024, 16, 24."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    context: int = 64
    """Longest text in tokens, start and end included."""
    dropout: float = 0.0
    """Of attention weights and hidden states. BERT's own is 0.1; at 0 any number of ranks and of micro-batches computes
    the same gradient."""


class _FirstTokenTower(TextEncoder):
    """Token ids (B, T) -> joint features (B, E), by the state of the first token of `model`."""

    def __init__(self, model: Any, tokenizer: Tokenizer, context: int, embed_dim: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.projection = nn.Linear(int(model.config.hidden_size), embed_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the un-normalised joint features (B, embed_dim) of texts (B, T), T <= context."""
        visible = is_text(ids, self.tokenizer.end).long()
        return self.projection(self.model(input_ids=ids, attention_mask=visible).last_hidden_state[:, 0])


class BertTower(_FirstTokenTower):
    """A BERT of the given size over the corpus's own vocabulary. Call `init_weights` before use.

    Its table of positions is as long as the context: what lies beyond would never be trained.

    Raises:
        UserError: the width is not divisible by the number of heads, or the context has no room for a text.
    """

    def __init__(self, config: BertTowerConfig, tokenizer: Tokenizer, embed_dim: int) -> None:
        from transformers import BertConfig, BertModel

        _check(config)
        size = BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.context,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            # The embedding of this id would stay 0, and tokenizers such as CLIP's pad with the end token.
            pad_token_id=None,
        )
        super().__init__(BertModel(size, add_pooling_layer=False), tokenizer, config.context, embed_dim)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps and embeddings N(0, 0.02), biases 0, as in BERT."""
        with torch_seeded(at):
            reset(self)
            fill(self, normal, (nn.Linear, nn.Embedding))


def _check(config: BertTowerConfig) -> None:
    if config.width % config.heads:
        raise UserError(
            f"the text tower's width {config.width} is not divisible by its {config.heads} heads: change "
            "--method.text.width or --method.text.heads."
        )
    if config.context < 3:
        raise UserError(
            f"a text context of {config.context} has no room for a start, a word and an end: raise "
            "--method.text.context to 3 or more."
        )


class PretrainedTower(_FirstTokenTower):
    """A pre-trained bidirectional language model of transformers, all of it trained on. Dropout is off.

    Call `init_weights` before use. Building it takes the model's configuration, filling it the weights.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        tokenizer: the corpus's; `init_weights` refuses another than the model's.
        context: longest text in tokens.
        embed_dim: width of the joint space.

    Raises:
        UserError: there is no such model, or it takes shorter texts only.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, context: int, embed_dim: int) -> None:
        from transformers import AutoConfig, AutoModel

        config = _fetch(AutoConfig, name)
        longest = getattr(config, "max_position_embeddings", context)
        if context > longest:
            raise UserError(
                f"the language model '{name}' reads {longest} tokens at most, and a text has {context}: lower "
                "--method.text.context."
            )
        model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        super().__init__(_without_pooler(model.float()), tokenizer, context, embed_dim)
        self.name = name
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def init_weights(self, at: Key) -> None:
        """Take over the model's weights, and set the projection from `at`: N(0, 0.02), bias 0.

        Raises:
            UserError: the weights cannot be had, the corpus has other tokens than the model, or the model's first
                token does not see the others.
        """
        from transformers import AutoModel

        _check_tokenizer(self.name, self.tokenizer)
        self.model.load_state_dict(_without_pooler(_fetch(AutoModel, self.name)).state_dict())
        self._check_first_token()
        with torch_seeded(at):
            fill(self.projection, normal)

    @torch.no_grad()
    def _check_first_token(self) -> None:
        """Refuse a model that reads from left to right: its first state would be the same for every text."""
        first, second = torch.zeros(2, 1, 3, dtype=torch.long)
        second[0, -1] = 1
        states = [self.model(input_ids=ids).last_hidden_state[:, 0] for ids in (first, second)]
        if torch.equal(*states):
            raise UserError(
                f"the language model '{self.name}' reads from left to right, so its first token knows no text: use one "
                "that reads both ways, such as a BERT."
            )


def _fetch(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except Exception as error:  # what a hub without a network raises is of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the language model '{name}' cannot be loaded ({reason}): give --method.text-model the folder of one, or "
            "the name of one that can be fetched."
        ) from None


def _without_pooler(model: Any) -> Any:
    """Return the model without the layer that BERT has for its second task; its output is not read."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _check_tokenizer(name: str, tokenizer: Tokenizer) -> None:
    file = Path(name) / "tokenizer.json"
    known = load_tokenizer(str(file) if Path(name).is_dir() else name)
    if known.model.get_vocab() != tokenizer.model.get_vocab():
        raise UserError(
            f"the tokens of the data set are not those of the language model '{name}': prepare the data set with "
            f"--tokenizer {file if file.is_file() else name}."
        )
