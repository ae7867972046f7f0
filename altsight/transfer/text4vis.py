"""Text4Vis: a video classifier whose last layer is taken from the class names and stays as it is.

Wu et al. 2023, "Revisiting Classifier: Transferring Vision-Language Models for Video Recognition"; specification 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from altsight.core.config import OptimConfig
from altsight.core.rng import Key
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.views import Crop
from altsight.methods.base import Method
from altsight.nn.temporal import TemporalTransformer
from altsight.transfer.base import ImageTower
from altsight.transfer.classifiers import ClassifierInit

MAX_SCALE = 100.0
"""Largest factor on the cosines; the source keeps it there by hand."""
OLD = 0.1
"""Factor on the learning rate of what was trained already."""


@dataclass(frozen=True)
class TemporalConfig:
    """How the frames of a video become one vector."""

    kind: Literal["transformer", "mean"] = "transformer"
    """A transformer over the frames, or none; their vectors are averaged in either case."""
    layers: int = 6
    heads: int = 0
    """0: one for every 64 dimensions of the joint space."""


@dataclass(frozen=True)
class VideoPrepare:
    """Document with frames -> frames: uint8 (T, 3, size, size); label: 0-d int64. One crop and flip for all frames.

    grayscale: how often a video loses its colours.
    """

    crop: Crop
    size: int
    grayscale: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        if "label" not in document.meta:
            return None
        frames: Tensor = document.meta["frames"]
        top, left, height, width = self.crop.box(frames.shape[2], frames.shape[3], at)
        part = frames[:, :, top : top + height, left : left + width]
        view = F.interpolate(part, (self.size, self.size), mode="bicubic", antialias=True)
        view = view.flip(-1) if self.crop.flips(at) else view
        if at.child("grayscale").generator().random() < self.grayscale:
            view = rgb_to_grayscale(view, num_output_channels=3)
        return {"frames": view, "label": torch.tensor(document.meta["label"])}


class Text4Vis(Method):
    """Frames -> vectors -> their mean, whose cosines with the rows of a class matrix, times a scale, are the logits.

    L = CE of the label. The matrix is constant unless `trainable`; encoder and scale learn at a tenth of the rate of
    what is new.

    Args:
        tower: the image side of a dual encoder.
        matrix: (C, E), of any length.
        scale: factor on the cosines at the start.
    """

    @dataclass(frozen=True)
    class Config:
        """What the classifier is; part of what its run is identified by."""

        weights: str
        """Hash of the encoder that it starts from."""
        classes: tuple[str, ...]
        """The sentences that the text tower is given."""
        init: ClassifierInit = "text"
        trainable: bool = False
        frames: int = 8
        dense: bool = False
        temporal: TemporalConfig = TemporalConfig()
        crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
        grayscale: float = 0.2
        shots: int = 0
        shorter: int = 256
        lda_videos: int = 60

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=5e-5, lr_base_batch=0, weight_decay=0.2, betas=(0.9, 0.999), warmup_fraction=5 / 30
    )

    def __init__(self, config: Text4Vis.Config, tower: ImageTower, matrix: Tensor, scale: float) -> None:
        super().__init__(tower.encoder)
        self.config = config
        self.tower = tower
        width, temporal = matrix.shape[1], config.temporal
        heads = temporal.heads or max(width // 64, 1)
        self.temporal = (
            TemporalTransformer(width, heads, temporal.layers, config.frames)
            if temporal.kind == "transformer"
            else None
        )
        self.matrix: Tensor
        if config.trainable:
            self.matrix = nn.Parameter(matrix.clone())
        else:
            self.register_buffer("matrix", matrix.clone())
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def init_weights(self, at: Key) -> None:
        """Set the temporal transformer from `at`; all else comes with weights."""
        if self.temporal is not None:
            self.temporal.init_weights(at.child("temporal"))

    def prepare(self, crop: Crop, size: int) -> VideoPrepare:
        """Return the preparation; the crop is the transfer's own."""
        return VideoPrepare(self.config.crop, size, self.config.grayscale)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count videos."""
        return {"classification": batch["label"].new_tensor(len(batch))}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Classify the videos."""
        logits = self.classify(self.vectors(batch["frames"]), self.matrix)
        return Outputs(local={"classification": F.cross_entropy(logits, batch["label"], reduction="sum")})

    def vectors(self, frames: Tensor) -> Tensor:
        """Return un-normalised vectors (B, E) of videos, uint8 (B, T, 3, size, size)."""
        encoded = self.encoder(self.encoder.normalize(frames.flatten(0, 1)))
        joint: Tensor = self.tower(encoded).unflatten(0, frames.shape[:2])
        return (joint if self.temporal is None else self.temporal(joint)).mean(dim=1)

    def classify(self, vectors: Tensor, matrix: Tensor) -> Tensor:
        """Return logits (B, C) in fp32 of vectors (B, E) under a class matrix (C, E), neither of unit length."""
        cosines = F.normalize(vectors.float(), dim=-1) @ F.normalize(matrix.float(), dim=-1).T
        return self.logit_scale.exp() * cosines

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale at `MAX_SCALE` or below."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def lr_scales(self) -> dict[str, float]:
        """Let what was trained already learn slower."""
        return {"encoder.": OLD, "tower.": OLD, "logit_scale": OLD}

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def report(self) -> dict[str, float]:
        """Return the factor on the cosines."""
        return {"scale": self.logit_scale.exp().item()}
