"""CLIP: match images with their texts across the batch (Radford et al. 2021; specification A1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.contrastive import clip_loss
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoder
from altsight.nn.text import TextConfig, TextTower


@dataclass(frozen=True)
class CLIPPrepare:
    """Document -> image: uint8 (3, size, size); text: (context,) int64. None without an image or a text."""

    crop: Crop
    size: int
    tokenizer: Tokenizer
    context: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not (document.images and document.texts):
            return None
        image = self.crop(document.images[0], self.size, at)
        return {"image": image, "text": self.tokenizer.encode(document.texts[0], self.context)}


class CLIP(Method):
    """Dual encoder with a symmetric softmax over the global batch.

    L = 1/2 [CE over the texts given an image + CE over the images given a text] of s * cosine, s learned, meaned over
    the global batch.

    The image feature is read at `feature_point`, the mean of the patch tokens, like that of every other method, where
    OpenAI's CLIP reads the CLS token; the encoder is the shared one. Both make methods comparable. For OpenAI's very
    image tower set --encoder.model vit_base_patch32_clip_quickgelu_224 --encoder.positions learned.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of CLIP at the paper's values for ViT-B."""

        text: TextConfig = field(default_factory=TextConfig)
        embed_dim: int = 512
        """Width of the joint space."""
        temperature: float = 0.07
        """What the cosines are divided by at the start; learned from there."""
        max_scale: float = 100.0
        """Largest inverse temperature."""

    # The paper warms up for 2,000 of its 32 epochs x 400 M pairs / 32,768 steps.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=5e-4,
        lr_base_batch=0,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        eps=1e-6,
        warmup_fraction=2000 * 32768 / (32 * 400e6),
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: TextTower
    image_projection: nn.Linear

    def __init__(self, config: CLIP.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("clip")
        self.text = TextTower(config.text, self.tokenizer, config.embed_dim)
        self.image_projection = nn.Linear(encoder.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        with torch_seeded(at.child("heads")):
            nn.init.normal_(self.image_projection.weight, std=self.encoder.width**-0.5)
        nn.init.constant_(self.logit_scale, -math.log(self.config.temperature))

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the text's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.text.context)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the un-normalised joint features of images and texts, (B, embed_dim) each."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible"))
        return Outputs(shared={"image": self.embed_image(encoded), "text": self.text(batch["text"])})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the contrastive loss."""
        return {"contrastive": clip_loss(shared["image"], shared["text"], self.logit_scale.exp())}

    def no_weight_decay(self) -> set[str]:
        """Exempt class token and position tables of both towers, as open_clip does, besides gains and biases."""
        towers = {"encoder": self.encoder.no_weight_decay(), "text": self.text.no_weight_decay()}
        return {f"{tower}.{name}" for tower, names in towers.items() for name in names}

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale between 1 and `max_scale`."""
        self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def report(self) -> dict[str, float]:
        """Return the inverse temperature."""
        return {"scale": self.logit_scale.exp().item()}
