"""BYOL: predict a slow teacher's projection of the other view (Grill et al. 2020; specification B6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.multicrop import ViewConfig
from altsight.data.views import Crop
from altsight.losses.instance import squared_distance
from altsight.methods.base import Corpus, Method
from altsight.methods.two_views import BYOL_FIRST, BYOL_SECOND, TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from altsight.nn.heads import MLPHead
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher, teacher_encoder


class BYOL(Method):
    """Online network with a predictor, and a target network that follows its encoder and projector. Images alone.

    L = |q1 - z2|^2 + |q2 - z1|^2 of unit vectors, q predicted, z the target network's.

    The source trains a ResNet-50 with LARS, and its optimizer is the default here; for a ViT set AdamW.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of BYOL at the paper's values for 1,000 epochs."""

        first: ViewConfig = BYOL_FIRST
        second: ViewConfig = BYOL_SECOND
        """How the two views are made; the study's crop is not used."""
        momentum: float = 0.996
        """Of the target network at the start; it rises to 1 on a half cosine. Shorter runs: 0.99."""
        hidden: int = 4096
        out_dim: int = 256

    # 1,000 epochs, 10 of them warm-up.
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="lars", lr=0.2, lr_base_batch=256, weight_decay=1.5e-6, warmup_fraction=10 / 1000
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    # Batch norm of a single row is a constant.
    least_batch: ClassVar[int] = 2

    def __init__(self, config: BYOL.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.momentum = config.momentum
        self.projector = MLPHead([encoder.width, config.hidden, config.out_dim], last_bias=False)
        self.predictor = MLPHead([config.out_dim, config.hidden, config.out_dim], last_bias=False)
        # Batch norm in the target uses the batch's statistics, as in the source: the running ones are those of older
        # weights. An encoder without batch norm computes as in evaluation, so that targets have no drop path.
        self.teacher = Teacher(self._students(), follows_mode=encoder.normalizes_batch)

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector}

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`; the target starts as a copy."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.projector)
            reset(self.predictor)
        self.teacher.copy_from(self._students())

    def prepare(self, crop: Crop, size: int) -> TwoViews:
        """Return the preparation: two views of the method's own."""
        return TwoViews(self.config.first, self.config.second, size)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the online and the target features of both views, (B, D) each, un-projected."""
        images = view_images(self.encoder, batch["image"], batch["colour"])
        visible = batch.get("visible")
        first, second = view_features(self.encoder, images, visible, self.feature_point)
        with torch.no_grad():
            target = teacher_encoder(self.teacher)
            first_target, second_target = view_features(target, images, visible, self.feature_point)
        shared = {"first": first, "second": second, "first_target": first_target, "second_target": second_target}
        return Outputs(shared=shared)

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share; batch norm in the heads sees one view of all ranks at a time."""
        first, second = (self.predictor(self.projector(shared[name])) for name in ("first", "second"))
        with torch.no_grad():
            project = self.teacher["projector"]
            first_target, second_target = (project(shared[f"{name}_target"]) for name in ("first", "second"))
        return {"distance": squared_distance(first, second_target) + squared_distance(second, first_target)}

    def after_step(self, at: Progress) -> None:
        """Let the target follow."""
        self.momentum = at.cosine(self.config.momentum, 1.0)
        self.teacher.follow(self._students(), self.momentum)

    def report(self) -> dict[str, float]:
        """Return the target's momentum."""
        return {"momentum": self.momentum}
