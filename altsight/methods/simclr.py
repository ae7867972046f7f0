"""SimCLR: tell the two views of an image from those of all others (Chen et al. 2020; specification B5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.multicrop import ViewConfig
from altsight.data.photometric import Photometric
from altsight.data.views import Crop
from altsight.losses.instance import nt_xent
from altsight.methods.base import Corpus, Method
from altsight.methods.two_views import TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from altsight.nn.heads import MLPHead
from altsight.nn.init import reset


class SimCLR(Method):
    """Contrast of two views with a softmax over all views of the global batch. Images alone.

    L = mean over the 2 B views of -log softmax of cosine / T at the other view of the same image, among the 2 B - 1
    other views.

    The source trains a ResNet-50 with LARS, and its optimizer is the default here; for a ViT set AdamW.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SimCLR at the values of the released code for ImageNet."""

        views: ViewConfig = field(default_factory=lambda: ViewConfig(colour=Photometric(0.8, 0.8, 0.8, 0.2)))
        """How each of the two views is made; the study's crop is not used."""
        temperature: float = 0.1
        layers: int = 3
        """Maps of the projection head: 3 (version 2) or 2 (version 1)."""
        hidden: int = 0
        """Width of its hidden layers; 0: as wide as the features."""
        out_dim: int = 128
        last_norm: bool = True
        """Batch norm behind the last map; SLIP's authors have none."""

    # 100 epochs, 10 of them warm-up.
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="lars", lr=0.3, lr_base_batch=256, weight_decay=1e-4, warmup_fraction=10 / 100
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    def __init__(self, config: SimCLR.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        hidden = [config.hidden or encoder.width] * (config.layers - 1)
        self.projector = MLPHead([encoder.width, *hidden, config.out_dim], "affine" if config.last_norm else "none")

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.projector)

    def prepare(self, crop: Crop, size: int) -> TwoViews:
        """Return the preparation: two views of the method's own."""
        return TwoViews(self.config.views, self.config.views, size)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the features of both views, (B, D) each, un-projected."""
        images = view_images(self.encoder, batch["image"], batch["colour"])
        first, second = view_features(self.encoder, images, batch.get("visible"), self.feature_point)
        return Outputs(shared={"first": first, "second": second})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share; batch norm in the head sees all views of all ranks at once, as in the source."""
        first, second = self.projector(torch.cat([shared["first"], shared["second"]])).chunk(2)
        return {"contrastive": nt_xent(first, second, self.config.temperature)}
