"""VisualGPT's GPT-2: between the layers of a language model, gates weigh what it says and what the image says.

Chen et al. 2022, "VisualGPT: Data-efficient Adaptation of Pretrained Language Models for Image Captioning"
(specification 8.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.caption import Attention, PostNormLayer
from altsight.nn.init import fill, normal, reset
from altsight.nn.text import LayerNorm

Gate = Literal["srau", "normalised", "complementary", "plain"]


@dataclass(frozen=True)
class GatedConfig:
    """Size of the decoder, GPT-2 small's by default, and how it takes in the image."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    length: int = 40
    """Longest caption in tokens, start and end included. [unconfirmed]: the source writes 20 words at most."""
    dropout: float = 0.1
    cross_dropout: float = 0.2
    """Of what the cross-attention hands over."""
    levels: int = 3
    """Layers of the visual encoder; the decoder reads the output of each."""
    visual_hidden: int = 2048
    """Width of the feed-forward in the visual encoder."""
    gate: Gate = "srau"
    """srau: each way is shut where its gate is below tau; normalised: the two are then divided by their sum;
    complementary: tau is 0; plain: no gates, a residual sum."""
    gate_input: Literal["concat", "hidden"] = "concat"
    """What the gate is computed from: text state and image together (the source's code) or the state (its paper)."""
    tau: float = 0.2


class VisualEncoder(nn.Module):
    """Patch tokens -> the outputs of `levels` post-norm layers, each (B, S, W).

    The source masks padded regions; patch tokens have none.
    """

    def __init__(self, config: GatedConfig, width_in: int) -> None:
        super().__init__()
        width, hidden, dropout = config.width, config.visual_hidden, config.dropout
        self.embed = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Dropout(dropout), LayerNorm(width))
        # ReLU is [unconfirmed]: the specification names none.
        self.layers = nn.ModuleList(
            PostNormLayer(width, config.heads, hidden, dropout, cross=False, activation=nn.ReLU())
            for _ in range(config.levels)
        )

    def forward(self, patches: Tensor) -> list[Tensor]:
        x, levels = self.embed(patches), []
        for layer in self.layers:
            x = layer(x)
            levels.append(x)
        return levels


def gates(alpha: Tensor, tau: float, kind: Gate) -> tuple[Tensor, Tensor]:
    """Return (language gate, vision gate), of the shape of `alpha` in [0, 1].

    A block adds language * (its own words) + vision * (what the cross-attention finds), language = alpha [alpha > tau]
    and vision = (1 - alpha) [1 - alpha > tau] (specification 8.1).

    A gate below tau is shut, which is a hard 0; the other one still carries a gradient to alpha, by which the shut one
    can open again (self-resurrecting activation unit; specification 8.1). From tau = 0.5 on both can be shut.
    """
    if kind == "plain":
        return torch.ones_like(alpha), torch.ones_like(alpha)
    if kind == "complementary":
        return alpha, 1 - alpha
    language, vision = alpha * (alpha > tau), (1 - alpha) * (1 - alpha > tau)
    if kind == "normalised":
        total = (language + vision).clamp_min(1e-6)
        return language / total, vision / total
    return language, vision


class _Block(nn.Module):
    """GPT-2's block, with the gated cross-attention between self-attention and MLP."""

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.tau, self.kind, self.concat = config.tau, config.gate, config.gate_input == "concat"
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads)
        self.cross_drop = nn.Dropout(config.cross_dropout)
        gated = config.levels if self.kind != "plain" else 0
        self.alphas = nn.ModuleList(nn.Linear(width * (1 + self.concat), width) for _ in range(gated))
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        normed = self.norm1(x)
        x = x + self.drop(self.attention(normed, normed, causal=True))
        if levels:
            mixed = [self._mix(x, level, number) for number, level in enumerate(levels)]
            # No residual around the gates: the language path is one of what they weigh.
            x = torch.stack(mixed).sum(dim=0) / len(levels) ** 0.5
        return x + self.drop(self.contract(F.gelu(self.expand(self.norm2(x)), approximate="tanh")))

    def _mix(self, x: Tensor, level: Tensor, number: int) -> Tensor:
        # The source norms text and image by the same norm, GPT-2's first.
        seen = self.cross_drop(self.cross(self.norm1(x), self.norm1(level)))
        if self.kind == "plain":
            return x + seen
        alpha = self.alphas[number](torch.cat([x, seen], dim=-1) if self.concat else x).sigmoid()
        language, vision = gates(alpha, self.tau, self.kind)
        return language * x + vision * seen

    def init_weights(self, residual: float) -> None:
        """Draw what is not N(0, 0.02): the ends of GPT-2's branches N(0, residual), what is new Xavier's."""
        for end in (self.attention.out, self.contract):
            nn.init.normal_(end.weight, std=residual)
        for module in (self.cross.query, self.cross.key, self.cross.value, *self.alphas):
            nn.init.xavier_uniform_(module.get_parameter("weight"))

    def load(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Take over the block `name` of a GPT-2, whose maps are stored input by output."""
        for theirs, norm in (("ln_1", self.norm1), ("ln_2", self.norm2)):
            _copy(norm, weights, name + theirs)
        maps = (("attn.c_proj", self.attention.out), ("mlp.c_fc", self.expand), ("mlp.c_proj", self.contract))
        for theirs, mine in maps:
            _copy(mine, weights, name + theirs, transposed=True)
        # One map makes query, key and value there; a bias of the keys has no effect.
        query, key, value = weights[name + "attn.c_attn.weight"].T.chunk(3)
        biases = weights[name + "attn.c_attn.bias"].chunk(3)
        self.attention.query.weight.copy_(query)
        self.attention.query.bias.copy_(biases[0])
        self.attention.key.weight.copy_(key)
        self.attention.value.weight.copy_(value)
        self.attention.value.bias.copy_(biases[2])


class GatedGPT2(nn.Module):
    """GPT-2 with gates; without an image it is GPT-2. Call `init_weights` before use.

    Raises:
        UserError: tau is no share.
    """

    def __init__(self, config: GatedConfig, vocab_size: int) -> None:
        super().__init__()
        if not 0 <= config.tau < 1:
            raise UserError(f"a gate's threshold of {config.tau:g} is none: set --method.decoder.tau within [0, 1).")
        self.config = config
        self.words = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: GPT-2's N(0, 0.02), divided by sqrt(2 layers) where a branch ends.

        Query, key and value of the cross-attention and the gates are Xavier's, biases 0 (the source's code).
        """
        residual = 0.02 * (2 * self.config.layers) ** -0.5
        with torch_seeded(at):
            reset(self)
            fill(self, normal, (nn.Linear, nn.Embedding))
            for block in self.blocks:
                assert isinstance(block, _Block)
                block.init_weights(residual)

    def forward(self, ids: Tensor, levels: Sequence[Tensor] = ()) -> Tensor:
        """Return next-token logits (B, T, V) for ids (B, T) and what the image shows, (B, S, W) a level."""
        x = self.drop(self.words(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, levels)
        return F.linear(self.norm(x), self.words.weight)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of transformers' GPT2LMHeadModel; the gates and the cross-attention stay.

        Raises:
            UserError: the language model has another vocabulary or size.
        """
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
        self._check(weights)
        self.words.weight.copy_(weights["wte.weight"])
        self.positions.weight.copy_(weights["wpe.weight"][: self.config.length])
        _copy(self.norm, weights, "ln_f")
        for number, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            block.load(weights, f"h.{number}.")

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        known, width = weights["wte.weight"].shape
        layers = len({name.split(".")[1] for name in weights if name.startswith("h.")})
        config, vocabulary = self.config, self.words.num_embeddings
        if known != vocabulary:
            raise UserError(
                f"the language model knows {known:,} tokens and the data set {vocabulary:,}: prepare the data set with "
                "the model's own tokenizer, for GPT-2 `altsight prepare --tokenizer gpt2`."
            )
        if (width, layers) != (config.width, config.layers) or len(weights["wpe.weight"]) < config.length:
            raise UserError(
                f"the language model is {width} wide, with {layers} layers and texts of up to "
                f"{len(weights['wpe.weight'])} tokens, and the decoder {config.width} with {config.layers} and "
                f"{config.length}: change --method.decoder.width, .layers or .length."
            )


def _copy(module: nn.Module, weights: Mapping[str, Tensor], name: str, transposed: bool = False) -> None:
    weight = weights[f"{name}.weight"]
    module.get_parameter("weight").copy_(weight.T if transposed else weight)
    module.get_parameter("bias").copy_(weights[f"{name}.bias"])


def language_model(name: str, heads: int) -> dict[str, Tensor]:
    """Return the weights of a GPT-2: a name or folder for transformers, or a .pt file of its GPT2LMHeadModel's state.

    Raises:
        UserError: there is none of that name, it is no GPT-2, or it has other than `heads` heads.
    """
    if name.endswith(".pt"):
        if not Path(name).is_file():
            raise UserError(f"the language model '{name}' does not exist: mend --method.language-model.")
        state: dict[str, Tensor] = torch.load(name, map_location="cpu", weights_only=True)
        return state
    from transformers import AutoConfig, GPT2LMHeadModel

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "gpt2":
            raise UserError(f"the language model '{name}' is a {config.model_type}: VisualGPT is made of a GPT-2.")
        if config.n_head != heads:
            raise UserError(f"the language model '{name}' has {config.n_head} heads: set --method.decoder.heads so.")
        state = GPT2LMHeadModel.from_pretrained(name).state_dict()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the language model '{name}' cannot be loaded ({reason}): mend --method.language-model."
        ) from None
    return state
