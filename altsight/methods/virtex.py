"""VirTex: learn to see by writing captions (Desai and Johnson 2021; specification 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.mirror import mirrored
from altsight.data.photometric import Photometric, photometric
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.captioning import (
    backwards,
    next_token_ce_sum,
    target_count,
    token_set_ce_sum,
    token_set_count,
)
from altsight.losses.tokens import token_ce_sum
from altsight.methods.base import Corpus, Method
from altsight.methods.mae import inference
from altsight.nn.caption import is_text
from altsight.nn.decoding import GREEDY, Decoding, write
from altsight.nn.encoder import Encoder
from altsight.nn.init import fill, normal
from altsight.nn.virtex import Reading, TextualHead, TextualHeadConfig

READINGS: dict[str, tuple[Reading, ...]] = {
    "bicaptioning": ("onwards", "backwards"),
    "captioning": ("onwards",),
    "masked_lm": ("both ways",),
}
"""Task -> the ways in which its head reads the caption; token classification reads none."""


@dataclass(frozen=True)
class VirTexPrepare:
    """Document -> image: uint8 (3, size, size); text: (length,) int64; colour: what is done to the image's colours.

    Where the crop mirrors the image, "left" and "right" change places in its caption. mask: draws the masked copy of
    the text, where the task is masked language modelling. None without an image or a text.
    """

    crop: Crop
    size: int
    tokenizer: Tokenizer
    length: int
    colour: Photometric
    mask: Masking | None

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not (document.images and document.texts):
            return None
        caption = document.texts[0]
        text = self.tokenizer.encode(mirrored(caption) if self.crop.flips(at) else caption, self.length)
        example = {"image": self.crop(document.images[0], self.size, at), "text": text, "colour": self.colour.draw(at)}
        if self.mask is not None:
            example["masked"] = self.mask(text, self.tokenizer, at)
        return example


@dataclass(frozen=True)
class Masking:
    """Replaces a share of a caption's words, at least one: 85 % by the mask, 10 % by any token, 5 % by themselves.

    Specification 9.2. Only what the mask hides is predicted, which is how the source's code has it (BERT predicts all).
    """

    share: float

    def __call__(self, text: Tensor, tokenizer: Tokenizer, at: Key) -> Tensor:
        """Return `text` (T,) with words replaced; the mask's id is the vocabulary's size."""
        words = int((is_text(text[None], tokenizer.end)).sum()) - 2
        rng = at.child("words").generator()
        chosen = 1 + rng.permutation(words)[: math.ceil(self.share * words)]
        what, other = rng.random(len(chosen)), rng.integers(tokenizer.vocab_size, size=len(chosen))
        if len(chosen) == 1:
            what[:] = 0.0  # a single word is hidden in any case, as in the source
        masked = text.clone()
        for place, drawn, token in zip(chosen.tolist(), what.tolist(), other.tolist(), strict=True):
            if drawn < 0.95:
                masked[place] = tokenizer.vocab_size if drawn < 0.85 else token
        return masked


class VirTex(Method):
    """Captions from a grid of image features, forwards and backwards; the encoder alone has to carry what is seen.

    L = CE of the next tokens + CE of the previous tokens, each a mean over all tokens of the global batch.

    The source trains a ResNet-50 (--encoder.model resnet50) with SGD at 0.2, which is the default here; a ViT reads
    its patch tokens as the grid and wants an optimizer of its own: --optim.name adamw --method.head-lr-scale 1.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of VirTex's best model."""

        task: Literal["bicaptioning", "captioning", "token_classification", "masked_lm"] = "bicaptioning"
        """Captions in both directions, onwards only, as a set of tokens, or with hidden words."""
        head: TextualHeadConfig = field(default_factory=TextualHeadConfig)
        mask_share: float = 0.15
        """Share of the words that masked_lm replaces."""
        colour: Photometric = field(default_factory=lambda: Photometric(grey=0.0, blur=0.0))
        head_lr_scale: float = 0.005
        """Factor on the learning rate of all but the encoder: under SGD the CNN learns at 0.2 and the rest at 0.001."""

    drops_patches: ClassVar[bool] = True
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="momentum",
        lr=0.2,
        lr_base_batch=0,
        weight_decay=1e-4,
        decay_all=True,
        betas=(0.9, 0.999),
        warmup_fraction=10_000 / 500_000,
        lookahead=5,
        clip_norm=10.0,
    )

    def __init__(self, config: VirTex.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("virtex")
        self.special = (self.tokenizer.pad, self.tokenizer.start, self.tokenizer.end)
        size, width = self.tokenizer.vocab_size, encoder.width
        self.head: TextualHead | None = None
        self.classifier: nn.Linear | None = None
        if config.task == "token_classification":
            self.classifier = nn.Linear(width, size)
        else:
            # Tokenizers have no token for a hidden word, so it is one more.
            size += config.task == "masked_lm"
            self.head = TextualHead(config.head, size, width, READINGS[config.task])

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        if self.head is not None:
            self.head.init_weights(at.child("head"))
        if self.classifier is not None:
            with torch_seeded(at.child("classifier")):
                fill(self.classifier, normal)

    def prepare(self, crop: Crop, size: int) -> VirTexPrepare:
        """Return the preparation: one crop, its colours, and the caption that fits it."""
        mask = Masking(self.config.mask_share) if self.config.task == "masked_lm" else None
        return VirTexPrepare(crop, size, self.tokenizer, self.config.head.length, self.config.colour, mask)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count what is predicted: tokens in each direction, hidden words, or captions."""
        if self.config.task == "token_classification":
            return {"tokens": token_set_count(batch["text"], self.special)}
        if self.config.task == "masked_lm":
            return {"masked": self._hidden(batch).sum()}
        return dict.fromkeys(READINGS[self.config.task], target_count(batch["text"], self.tokenizer.end))

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the coloured image and predict its caption from the patch tokens."""
        images = self.encoder.normalize(photometric(batch["image"], batch["colour"]))
        grid, ids = self.encoder(images, batch.get("visible")).patches, batch["text"]
        if self.classifier is not None:
            return Outputs(local={"tokens": token_set_ce_sum(self.classifier(grid.mean(dim=1)), ids, self.special)})
        assert self.head is not None
        text, memory = is_text(ids, self.tokenizer.end), self.head.projection(grid)
        if self.config.task == "masked_lm":
            logits = self.head(batch["masked"], text, memory, "both ways")
            return Outputs(local={"masked": token_ce_sum(logits, ids, self._hidden(batch))})
        logits = self.head(ids[:, :-1], text[:, :-1], memory, "onwards")
        local = {"onwards": next_token_ce_sum(logits, ids, self.tokenizer.end)}
        if self.config.task == "bicaptioning":
            ids = backwards(ids, text)
            logits = self.head(ids[:, :-1], text[:, :-1], memory, "backwards")
            local["backwards"] = token_ce_sum(logits, ids[:, 1:], text[:, 1:])
        return Outputs(local=local)

    def no_weight_decay(self) -> set[str]:
        """Exempt gains and biases of the words' embedding and of the transformers; those of the CNN decay."""
        inside = ("head.norm.", "head.transformers.")
        return {name for name, p in self.named_parameters() if p.ndim < 2 and name.startswith(inside)}

    def lr_scales(self) -> dict[str, float]:
        """Return the factor of what is thrown away afterwards."""
        return dict.fromkeys(("head.", "classifier."), self.config.head_lr_scale)

    @property
    def caption(self) -> Callable[..., list[str]]:
        """The captioner; AttributeError for tasks that learn to write no captions."""
        if "onwards" not in READINGS.get(self.config.task, ()):
            raise AttributeError(f"{self.config.task} writes no captions")
        return self._caption

    def _caption(
        self, images: Tensor, max_length: int | None = None, prefix: str = "", decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8, starting with `prefix`; see MUG's."""
        head, length = self.head, self.config.head.length
        assert head is not None
        with inference(self):
            memory = head.projection(self.encoder(self.encoder.normalize(images)).patches)

            def step(ids: Tensor, rows: Tensor) -> Tensor:
                logits: Tensor = head(ids, torch.ones_like(ids, dtype=torch.bool), memory[rows], "onwards")
                return logits[:, -1]

            return write(step, self.tokenizer, images, prefix, min(max_length or length, length), decoding)

    def _hidden(self, batch: Batch) -> Tensor:
        """Return (B, T) bool: True where the mask hides a word."""
        return batch["masked"] == self.tokenizer.vocab_size
