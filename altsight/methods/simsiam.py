"""SimSiam: predict one view's projection from the other's, without negatives or a teacher.

Chen and He 2021, "Exploring simple siamese representation learning" (specification B7).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.multicrop import ViewConfig
from altsight.data.views import Crop
from altsight.losses.instance import negative_cosine
from altsight.methods.base import Corpus, Method
from altsight.methods.two_views import TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from altsight.nn.heads import MLPHead
from altsight.nn.init import reset


class SimSiam(Method):
    """Siamese encoder whose targets are constants: the stopped gradient alone keeps it from collapsing. Images alone.

    L = -1/2 cosine(p1, z2) - 1/2 cosine(p2, z1), z without a gradient.

    The source trains a ResNet-50 with SGD, and its optimizer is the default here; for a ViT set AdamW.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SimSiam at the paper's values."""

        views: ViewConfig = field(default_factory=lambda: ViewConfig(crop=Crop(scale=(0.2, 1.0))))
        """How each of the two views is made, as in MoCo v2; the study's crop is not used."""
        hidden: int = 2048
        out_dim: int = 2048
        bottleneck: int = 512
        """Hidden width of the predictor."""

    # 100 epochs without a warm-up. timm's "momentum" is SGD without Nesterov's step; betas[0] is the momentum.
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="momentum", lr=0.05, lr_base_batch=256, weight_decay=1e-4, decay_all=True, warmup_fraction=0.0
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    # Batch norm of a single row is a constant.
    least_batch: ClassVar[int] = 2

    def __init__(self, config: SimSiam.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = MLPHead([encoder.width, config.hidden, config.hidden, config.out_dim], "plain")
        self.predictor = MLPHead([config.out_dim, config.bottleneck, config.out_dim])

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.projector)
            reset(self.predictor)

    def prepare(self, crop: Crop, size: int) -> TwoViews:
        """Return the preparation: two views of the method's own."""
        return TwoViews(self.config.views, self.config.views, size)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the features of both views, (B, D) each, un-projected."""
        images = view_images(self.encoder, batch["image"], batch["colour"])
        first, second = view_features(self.encoder, images, batch.get("visible"), self.feature_point)
        return Outputs(shared={"first": first, "second": second})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share; batch norm in the heads sees one view of all ranks at a time."""
        first, second = self.projector(shared["first"]), self.projector(shared["second"])
        forth = negative_cosine(self.predictor(first), second)
        back = negative_cosine(self.predictor(second), first)
        return {"similarity": (forth + back) / 2}

    def constant_lr(self) -> tuple[str, ...]:
        """The predictor's rate does not fall: it has to keep up with the newest projections."""
        return ("predictor.",)
