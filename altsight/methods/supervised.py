"""Supervised: predict the label; the baseline that label-free methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.views import Crop
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoder
from altsight.nn.init import fill, truncated


@dataclass(frozen=True)
class SupervisedPrepare:
    """Document -> image: uint8 (3, size, size); label: 0-d int64. None without an image or a label."""

    crop: Crop
    size: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images or "label" not in document.meta:
            return None
        image = self.crop(document.images[0], self.size, at)
        return {"image": image, "label": torch.tensor(document.meta["label"])}


class Supervised(Method):
    """Linear classifier on the encoder, trained together.

    L = CE of the label.

    Optimizer and schedule are those of MAE's supervised reference, ViT-B from scratch (specification B1). Its
    RandAugment, mixup and cutmix are left out, since all methods see the same crops; its weight average, which says
    nothing in runs of less than some ten thousand steps, is --optim.ema 0.9999.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of the classifier."""

        label_smoothing: float = 0.1

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-4, lr_base_batch=256, weight_decay=0.3, betas=(0.9, 0.95), warmup_fraction=20 / 300
    )

    drops_patches: ClassVar[bool] = True

    def __init__(self, config: Supervised.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.head = nn.Linear(encoder.width, len(corpus.need_classes("supervised")))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            fill(self.head, truncated)

    def prepare(self, crop: Crop, size: int) -> SupervisedPrepare:
        """Return the preparation: one crop and the label."""
        return SupervisedPrepare(crop, size)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count images."""
        return {"classification": batch["label"].new_tensor(len(batch))}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Classify the feature at `feature_point`."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible"))
        # Softmax in fp32 even where the head runs in bf16.
        logits = self.head(self.encoder.point(encoded, self.feature_point)).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.config.label_smoothing, reduction="sum")
        return Outputs(local={"classification": loss})

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
