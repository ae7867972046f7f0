"""FLIP: CLIP on half of the patches (Li et al. 2023; specification A7)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.views import Crop, random_keep
from altsight.losses.contrastive import clip_loss
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.text import TextConfig, TextTower


@dataclass(frozen=True)
class FLIPPrepare:
    """CLIP's image and text, and keep: (K,) int64, the patches that stay visible; no keep where nothing is masked."""

    pairs: CLIPPrepare
    patches: int
    mask_ratio: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.pairs(document, at)
        if example is not None and self.mask_ratio:
            example["keep"] = random_keep(self.patches, self.mask_ratio, at)
        return example


def _text() -> TextConfig:
    """Return FLIP's text tower for ViT-B: it reads both ways, padding included, and ends at the first token."""
    return TextConfig(context=32, quick_gelu=False, causal=False, pool="first")


class FLIP(Method):
    """Dual encoder whose image tower sees random patches only. Nothing is reconstructed, and no word is masked.

    L = 1/2 [CE over the texts given an image + CE over the images given a text] of s * cosine: CLIP's.

    In the joint space an image is the mean of all tokens, CLS included. Frozen features are read at `feature_point`,
    the mean of the patch tokens, like those of every other method. The source's image tower is the shared encoder with
    its defaults. Its second stage, a short tuning on whole images from these weights, is left out.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of FLIP with ViT-B."""

        mask_ratio: float = 0.5
        """Share of the patches that is left out; 0: none."""
        text: TextConfig = field(default_factory=_text)
        """It starts as CLIP's does."""
        embed_dim: int = 512
        """Width of the joint space."""
        temperature: float = 0.07
        """What the cosines are divided by at the start; learned from there."""
        max_scale: float = 100.0
        """Largest inverse temperature."""

    # 51.2 million samples of warm-up out of 12.8 billion.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=4e-6, lr_base_batch=256, weight_decay=0.2, betas=(0.9, 0.95), warmup_fraction=51.2e6 / 12.8e9
    )
    shares: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: TextTower
    image_projection: nn.Linear

    def __init__(self, config: FLIP.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        if not (0 <= config.mask_ratio < 1 and int(encoder.num_patches * (1 - config.mask_ratio))):
            raise UserError(
                f"a mask ratio of {config.mask_ratio:g} must leave some of the {encoder.num_patches} patches visible: "
                "set --method.mask-ratio within [0, 1)."
            )
        self.config = config
        self.tokenizer = corpus.need_tokenizer("flip")
        self.text = TextTower(config.text, self.tokenizer, config.embed_dim)
        self.image_projection = nn.Linear(encoder.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        with torch_seeded(at.child("heads")):
            nn.init.xavier_uniform_(self.image_projection.weight)
        nn.init.constant_(self.logit_scale, -math.log(self.config.temperature))

    def prepare(self, crop: Crop, size: int) -> FLIPPrepare:
        """Return the preparation: one crop, the text's tokens and a random mask."""
        pairs = CLIPPrepare(crop, size, self.tokenizer, self.text.context)
        return FLIPPrepare(pairs, self.encoder.patches_at(size), self.config.mask_ratio)

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the projected mean of all tokens (B, embed_dim), un-normalised."""
        return self.image_projection(encoded.tokens.mean(dim=1))

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the un-normalised joint features of visible patches and of texts, (B, embed_dim) each."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("keep"))
        return Outputs(shared={"image": self.embed_image(encoded), "text": self.text(batch["text"])})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the contrastive loss."""
        return {"contrastive": clip_loss(shared["image"], shared["text"], self.logit_scale.exp())}

    def no_weight_decay(self) -> set[str]:
        """Exempt class token and position tables, besides gains and biases."""
        towers = {"encoder": self.encoder.no_weight_decay(), "text": self.text.no_weight_decay()}
        return {f"{tower}.{name}" for tower, names in towers.items() for name in names}

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale between 1 and `max_scale`."""
        self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def report(self) -> dict[str, float]:
        """Return the inverse temperature."""
        return {"scale": self.logit_scale.exp().item()}
