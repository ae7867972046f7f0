"""ALIGN: a convolutional net and a BERT, matched by a smoothed softmax over the global batch (Jia et al. 2021; A2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.views import Crop
from altsight.losses.contrastive import align_loss
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.nn.encoder import Encoder
from altsight.nn.language import BertTower, BertTowerConfig


class ALIGN(Method):
    """Dual encoder of any timm backbone and a BERT that starts from random weights.

    L = CE over the texts given an image + CE over the images given a text, of cosine / T, with smoothed labels, meaned
    over the global batch.

    The source's image towers are EfficientNets (--encoder.model efficientnet_b5). timm's end in the 1x1 convolution of
    the classifier's head, which the source leaves out, so that B7 has 2,560 channels here and 640 there: what is
    trained is what is evaluated.

    The temperature is learned as it is, a divisor. It stays positive by a floor, which is applied after every step.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of ALIGN with BERT-base."""

        text: BertTowerConfig = field(default_factory=BertTowerConfig)
        embed_dim: int | None = None
        """Width of the joint space; the image gets a linear map to it. None: the encoder's width, without a map."""
        temperature: float = 1.0
        """What the cosines are divided by at the start; learned from there."""
        min_temperature: float = 0.01
        """[unconfirmed]: CLIP's bound; the source's ends near 1/64."""
        label_smoothing: float = 0.1

    # timm's LAMB clips the norm of the whole gradient at 1 by itself, so `clip_norm` stays 0: only one below 1 would
    # change anything. It leaves the rate of what does not decay as it is. Betas and eps are [unconfirmed].
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="lamb",
        lr=1e-3,
        lr_base_batch=0,
        weight_decay=1e-5,
        betas=(0.9, 0.999),
        eps=1e-6,
        warmup_fraction=10_000 / 1_200_000,
        schedule="linear",
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: BertTower
    image_projection: nn.Linear | None

    def __init__(self, config: ALIGN.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("align")
        self.text = BertTower(config.text, self.tokenizer, config.embed_dim or encoder.width)
        if config.embed_dim is not None:
            self.image_projection = nn.Linear(encoder.width, config.embed_dim)
        self.temperature = nn.Parameter(torch.empty(()))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        if self.image_projection is not None:
            with torch_seeded(at.child("heads")):
                nn.init.normal_(self.image_projection.weight, std=self.encoder.width**-0.5)
                nn.init.zeros_(self.image_projection.bias)
        nn.init.constant_(self.temperature, self.config.temperature)

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the text's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.text.context)

    def similarity(self) -> tuple[float, float]:
        """Return the inverse temperature."""
        return 1 / float(self.temperature.detach()), 0.0

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the un-normalised joint features of images and texts, (B, E) each."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible"))
        return Outputs(shared={"image": self.embed_image(encoded), "text": self.text(batch["text"])})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the contrastive loss, the sum of both directions."""
        smoothing = self.config.label_smoothing
        return {"contrastive": align_loss(shared["image"], shared["text"], self.temperature, smoothing)}

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the temperature at `min_temperature` or above."""
        self.temperature.clamp_(min=self.config.min_temperature)

    def report(self) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": self.temperature.item()}
