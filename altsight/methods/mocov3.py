"""MoCo v3: find a momentum encoder's key of the other view in the batch (Chen et al. 2021; specification B4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.multicrop import ViewConfig
from altsight.data.views import Crop
from altsight.losses.instance import info_nce
from altsight.methods.base import Corpus, Method
from altsight.methods.two_views import BYOL_FIRST, BYOL_SECOND, TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from altsight.nn.heads import MLPHead
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher, teacher_encoder


class MoCoV3(Method):
    """Queries from an encoder, projector and predictor; keys from a momentum encoder and projector. Images alone.

    L = 2 T [CE of q1 . k2 / T + CE of q2 . k1 / T] over the keys of the global batch.

    Features are read at `feature_point`, the mean of the patch tokens, like those of every other method, where the
    source reads the CLS token. For its very encoder set --encoder.init moco, and --encoder.heads 12 for ViT-S.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of MoCo v3 at the paper's values for a ViT."""

        first: ViewConfig = BYOL_FIRST
        second: ViewConfig = BYOL_SECOND
        """How the two views are made; the study's crop is not used. For a ResNet the source crops to 0.2 at least."""
        temperature: float = 0.2
        """For a ResNet the source uses 1."""
        momentum: float = 0.99
        """Of the key encoder at the start; it rises to 1 on a half cosine."""
        hidden: int = 4096
        out_dim: int = 256
        freeze_patch_embed: bool = True
        """Leave a ViT's patch projection at its random start, which keeps training stable."""

    # 300 epochs, 40 of them warm-up.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-4,
        lr_base_batch=256,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        decay_all=True,
        warmup_fraction=40 / 300,
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    def __init__(self, config: MoCoV3.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.momentum = config.momentum
        # As in the source, a ResNet gets a projector of two maps instead of three, and a predictor without last norm.
        hidden = [config.hidden] * (2 if encoder.is_vit else 1)
        self.projector = MLPHead([encoder.width, *hidden, config.out_dim], "plain")
        last: Literal["plain", "none"] = "plain" if encoder.is_vit else "none"
        self.predictor = MLPHead([config.out_dim, config.hidden, config.out_dim], last, last_bias=False)
        if encoder.is_vit and config.freeze_patch_embed:
            encoder.backbone.patch_embed.requires_grad_(False)
        # In the source keys are computed in training mode. That matters to batch norm, whose running statistics are
        # those of older weights, so such an encoder does; any other computes as in evaluation, without drop path.
        self.teacher = Teacher(self._students(), follows_mode=encoder.normalizes_batch)

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector}

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`; the key encoder starts as a copy."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.projector)
            reset(self.predictor)
        self.teacher.copy_from(self._students())

    def prepare(self, crop: Crop, size: int) -> TwoViews:
        """Return the preparation: two views of the method's own."""
        return TwoViews(self.config.first, self.config.second, size)

    def start_step(self, at: Progress) -> None:
        """Let the key encoder follow, before it computes the keys of this step."""
        self.momentum = at.cosine(self.config.momentum, 1.0)
        self.teacher.follow(self._students(), self.momentum)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the features of queries and keys for both views, (B, D) each, un-projected."""
        images = view_images(self.encoder, batch["image"], batch["colour"])
        visible = batch.get("visible")
        first, second = view_features(self.encoder, images, visible, self.feature_point)
        with torch.no_grad():
            slow = teacher_encoder(self.teacher)
            first_key, second_key = view_features(slow, images, visible, self.feature_point)
        return Outputs(shared={"first": first, "second": second, "first_key": first_key, "second_key": second_key})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share; batch norm in the heads sees one view of all ranks at a time."""
        first, second = (self.predictor(self.projector(shared[name])) for name in ("first", "second"))
        with torch.no_grad():
            project = self.teacher["projector"]
            first_key, second_key = (project(shared[f"{name}_key"]) for name in ("first", "second"))
        temperature = self.config.temperature
        return {"contrastive": info_nce(first, second_key, temperature) + info_nce(second, first_key, temperature)}

    def report(self) -> dict[str, float]:
        """Return the key encoder's momentum."""
        return {"momentum": self.momentum}
