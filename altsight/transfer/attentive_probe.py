"""The attentive probe: attention pooling and a linear classifier on frozen tokens, LCL's frozen transfer.

The pooling is LCL's own: one learned query over the patch tokens behind the encoder's last norm; its CLS token is not
looked at. Which optimizer, batch and length LCL used is in none of the sources that were seen: the defaults are ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.views import Crop
from altsight.evals.base import Preprocess, Result, View
from altsight.methods.base import Method
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.interleaved import Project
from altsight.train.run import weights_hash
from altsight.transfer.base import FitConfig, fit, prepared_for
from altsight.transfer.classify import open_sets, score
from altsight.transfer.labels import Labels

HEAD_STD = 0.01
"""Standard deviation of the classifier's weights at the start, as in the linear probe."""
ADAMW = OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup_fraction=0.1)


@dataclass(frozen=True)
class AttentiveProbeConfig:
    """What an attentive probe is, and what it sees in training; part of what its run is identified by."""

    weights: str
    """Hash of the frozen encoder."""
    preprocess: str
    crop: Crop | None
    """Random views; None: every image as it is evaluated."""


@dataclass(frozen=True)
class AttentiveProbe:
    """Train attention pooling and a linear classifier on frozen tokens, and score them on other images."""

    data: str
    """Training images: a folder of class folders, tars, Parquet, tables, as `altsight prepare` takes them."""
    test: str
    """Images that the classifier is scored on, in any of these layouts."""
    val: str = ""
    """Further images that it is scored on, to choose settings by."""
    label: str = "label"
    """Field with the class; "label" in a folder of class folders."""
    augment: bool = True
    """See a new crop of every image each time; otherwise always the pixels that are evaluated."""
    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    optim: OptimConfig = ADAMW
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=90, batch=1024, checkpoint_every=5_000_000))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return top-1, top-5 and mean-per-class accuracy of the val and the test set.

        Raises:
            UserError: a set or a setting cannot be used; nothing has been written then.
        """
        train, held_out = open_sets(self.data, self.val, self.test, Labels(self.label))
        crop = self.crop if self.augment else None
        config = AttentiveProbeConfig(weights_hash(view.encoder), view.preprocess.hash(), crop)
        model = fit(
            "attentive_probe",
            lambda: AttentiveClassifier(config, view, len(train.classes), key(self.fit.seed, 0, "attentive probe")),
            config,
            self.optim,
            self.fit,
            prepared_for(train, Path(self.data), train.digest()),
            out,
        )
        assert isinstance(model, AttentiveClassifier)
        pooled = model.as_view(view)
        return [
            replace(result, feature_point="attention over patches")
            for split, images in held_out.items()
            for result in score(pooled, model.logits, images, split, "attentive_probe", self.fit.seed)
        ]


@dataclass(frozen=True)
class AttentivePrepare:
    """Document -> image: uint8 (3, size, size); label: 0-d int64. None without a class."""

    crop: Crop | None
    preprocess: Preprocess

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.meta["classes"]:
            return None
        data = document.images[0]
        image = self.preprocess(data) if self.crop is None else self.crop(data, self.preprocess.size, at)
        return {"image": image, "label": torch.tensor(document.meta["classes"][0])}


class AttentiveClassifier(Method):
    """A frozen encoder, LCL's attention pooling of its patch tokens, and a linear map.

    L = CE of the label.
    """

    optim: ClassVar[OptimConfig] = ADAMW

    def __init__(self, config: AttentiveProbeConfig, view: View, classes: int, at: Key) -> None:
        super().__init__(copy.deepcopy(view.encoder).requires_grad_(False))
        self.config, self.preprocess = config, view.preprocess
        width = self.encoder.width
        heads = self.encoder.heads if self.encoder.is_vit else 1
        self.pool = Project(width, width, heads, pool=True)
        self.head = nn.Linear(width, classes)
        self.pool.init_weights(at.child("pool"))
        with torch_seeded(at.child("head")):
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> AttentiveClassifier:
        """Switch all but the encoder to training mode; returns self."""
        super().train(mode)
        self.encoder.eval()
        return self

    def pooled(self, encoded: Encoded) -> Tensor:
        """Return the vector (B, D) of each image that the classifier reads."""
        found = self.pool(encoded.patches)[1]
        assert found is not None, "it pools"
        return cast(Tensor, found)

    def as_view(self, view: View) -> View:
        """Return `view` with the pooled vectors as its features, and without a joint space."""
        encoder = cast(Encoder, PooledEncoder(self))
        return replace(view, encoder=encoder, text=None, embed_image=None, project=None, cache={}, store=None)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the scores (n, classes) of pooled vectors (n, D), fp32 on the vectors' device."""
        found: Tensor = self.head(features.to(self.head.weight.device))
        return found.to(features.device)

    def prepare(self, crop: Crop, size: int) -> AttentivePrepare:
        """Return the preparation; the crop is the probe's own."""
        return AttentivePrepare(self.config.crop, self.preprocess)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count images."""
        return {"classification": batch["label"].new_tensor(len(batch))}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Classify the pooled tokens."""
        with torch.no_grad():
            encoded = self.encoder(self.encoder.normalize(batch["image"]))
        # Softmax in fp32 even where the head runs in bf16.
        logits = self.head(self.pooled(encoded)).float()
        return Outputs(local={"classification": F.cross_entropy(logits, batch["label"], reduction="sum")})


class PooledEncoder(nn.Module):
    """Stands in for an encoder in a `View`: its only feature point is what an attentive probe pools."""

    def __init__(self, model: AttentiveClassifier) -> None:
        super().__init__()
        self.model = model

    def normalize(self, images: Tensor) -> Tensor:
        """Return what the probe's encoder takes."""
        return self.model.encoder.normalize(images)

    def forward(self, images: Tensor) -> Encoded:
        """Return the encoded images."""
        encoded: Encoded = self.model.encoder(images)
        return encoded

    def point(self, encoded: Encoded, name: str) -> Tensor:
        """Return the pooled vectors (B, D)."""
        return self.model.pooled(encoded)
