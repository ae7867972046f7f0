"""SigLIP: every pair of an image and a text is a match or not, by itself (Zhai et al. 2023; specification A5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs
from altsight.data.views import Crop
from altsight.losses.sigmoid import sigmoid_loss
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.pool import MAPHead
from altsight.nn.text import TextConfig, TextTower


def _text() -> TextConfig:
    """Return the size of SigLIP's text tower, that of ViT-B."""
    return TextConfig(
        width=768,
        heads=12,
        context=64,
        quick_gelu=False,
        causal=False,
        pool="last",
        pad_with_end=True,
        projection_bias=True,
    )


class SigLIP(Method):
    """Dual encoder with a sigmoid for every pair, in place of a softmax over the batch.

    L = -1/B sum_ij log sigmoid(z_ij (t * cosine_ij + b)), z_ij = 1 where text j is image i's and -1 elsewhere; t, b
    learned.

    In the joint space an image is what attention pooling makes of its patch tokens, as wide as the encoder. Frozen
    features are read at `feature_point`, like those of every other method. For the source's image tower set
    --encoder.positions learned --encoder.normalization half; it has no CLS token, which the pooling does not see here.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SigLIP B."""

        text: TextConfig = field(default_factory=_text)
        """A text tower as large as the image tower. It starts as CLIP's does."""
        scale: float = 10.0
        """What the cosines are multiplied by at the start; learned from there."""
        bias: float = -10.0
        """What is added then, learned too: at the start nearly all pairs are no match, and are taken for none."""

    # Rate, decay and clipping are [unconfirmed]: those of SigLIP 2, whose Adam stands here for SigLIP's Adafactor; both
    # have this beta2. The source's decay of 1e-4 is not multiplied by the learning rate, which torch does: 1e-4 / 1e-3.
    # SigLIP 2 warms up for 20,000 steps of 32,768 samples out of 40 billion.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-3,
        lr_base_batch=0,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        warmup_fraction=20_000 * 32_768 / 40e9,
        clip_norm=1.0,
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: TextTower

    def __init__(self, config: SigLIP.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("siglip")
        self.text = TextTower(config.text, self.tokenizer, encoder.width)
        # Heads as in the encoder; where it has none, of the usual 64 channels.
        self.pool = MAPHead(encoder.width, encoder.heads if encoder.is_vit else encoder.width // 64)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.empty(()))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        self.pool.init_weights(at.child("pool"))
        nn.init.constant_(self.log_scale, math.log(self.config.scale))
        nn.init.constant_(self.bias, self.config.bias)

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the text's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.text.context)

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the pooled patch tokens (B, D), un-normalised."""
        return self.pool(encoded.patches)

    def similarity(self) -> tuple[float, float]:
        """Return scale and bias of the sigmoid."""
        return float(self.log_scale.detach().exp()), float(self.bias.detach())

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the un-normalised joint features of images and texts, (B, D) each."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible"))
        return Outputs(shared={"image": self.embed_image(encoded), "text": self.text(batch["text"])})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the sigmoid loss."""
        return {"sigmoid": sigmoid_loss(shared["image"], shared["text"], self.log_scale.exp(), self.bias)}

    def no_weight_decay(self) -> set[str]:
        """Exempt all that is no map: tokens, position tables, the probe and the embeddings of words."""
        tables = {
            "encoder": self.encoder.no_weight_decay(),
            "text": self.text.no_weight_decay() | {"token_embedding.weight"},
            "pool": self.pool.no_weight_decay(),
        }
        return {f"{part}.{name}" for part, names in tables.items() for name in names}

    def report(self) -> dict[str, float]:
        """Return scale and bias."""
        return {"scale": self.log_scale.exp().item(), "bias": self.bias.item()}
