"""SLIP: CLIP and SimCLR on one image encoder.

Mu et al. 2022, "SLIP: self-supervision meets language-image pre-training" (specification A3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.multicrop import ViewConfig, draw_views, stack_views
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.contrastive import clip_loss
from altsight.losses.instance import nt_xent
from altsight.methods.base import Corpus, Method
from altsight.methods.two_views import TwoViews, view_features, view_images
from altsight.nn.encoder import Encoder
from altsight.nn.heads import MLPHead
from altsight.nn.init import reset
from altsight.nn.text import TextConfig, TextTower


@dataclass(frozen=True)
class SLIPPrepare:
    """Document -> image: uint8 (3, size, size); text: (context,) int64; views: uint8 (2, 3, size, size); colour: fp32
    (2, 11), of the views. None without an image or a text.

    The image is decoded once for all three; the first has the box that CLIP cuts at the same key.
    """

    crop: Crop
    views: TwoViews
    tokenizer: Tokenizer
    context: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not (document.images and document.texts):
            return None
        whole = ("", ViewConfig(crop=self.crop), self.views.size)
        (image, _), *drawn = draw_views(document.images[0], [whole, *self.views.wanted], at)
        views, colour = stack_views(drawn)
        text = self.tokenizer.encode(document.texts[0], self.context)
        return {"image": image, "text": text, "views": views, "colour": colour}


class SLIP(Method):
    """Dual encoder with CLIP's loss on one crop and SimCLR's on two views of the same image: three forward passes.

    L = CLIP's loss + views_weight * SimCLR's.

    The gradient of the contrastive loss is exact over all ranks; the released code gathers without a gradient there
    (specification 0.3, variant 4), which biases it. Features are read at `feature_point`, the mean of the patch
    tokens, where the source reads the CLS token; its ViT-S has --encoder.heads 12.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SLIP at the values of the released code."""

        text: TextConfig = field(default_factory=TextConfig)
        embed_dim: int = 512
        """Width of the joint space of images and texts."""
        temperature: float = 0.07
        """What the cosines of images and texts are divided by at the start; learned from there."""
        max_scale: float = 100.0
        """Largest inverse temperature."""
        views: ViewConfig = field(default_factory=ViewConfig)
        """How each of the two views is made. The image beside a text is cut by the study's crop instead, which is
        (0.5, 1) without a flip in the source."""
        views_weight: float = 1.0
        views_temperature: float = 0.1
        hidden: int = 4096
        out_dim: int = 256

    # 25 epochs at a batch of 4,096, one of them warm-up.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=3e-3,
        lr_base_batch=0,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        eps=1e-8,
        warmup_fraction=1 / 25,
        warmup_lr=1e-6,
        min_lr=1e-5,
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: TextTower
    image_projection: nn.Linear

    def __init__(self, config: SLIP.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("slip")
        self.text = TextTower(config.text, self.tokenizer, config.embed_dim)
        self.image_projection = nn.Linear(encoder.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.projector = MLPHead([encoder.width, config.hidden, config.hidden, config.out_dim])

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`, CLIP's from the keys that CLIP itself uses."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        with torch_seeded(at.child("heads")):
            nn.init.normal_(self.image_projection.weight, std=self.encoder.width**-0.5)
        with torch_seeded(at.child("projector")):
            reset(self.projector)
        nn.init.constant_(self.logit_scale, -math.log(self.config.temperature))

    def prepare(self, crop: Crop, size: int) -> SLIPPrepare:
        """Return the preparation: the study's crop with the text's tokens, and two views of the method's own."""
        views = TwoViews(self.config.views, self.config.views, size)
        return SLIPPrepare(crop, views, self.tokenizer, self.text.context)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return joint features of images and texts, (B, embed_dim), and un-projected ones of the views, (B, D)."""
        visible = batch.get("visible")
        encoded = self.encoder(self.encoder.normalize(batch["image"]), visible)
        images = view_images(self.encoder, batch["views"], batch["colour"])
        first, second = view_features(self.encoder, images, visible, self.feature_point)
        joint = {"image": self.embed_image(encoded), "text": self.text(batch["text"])}
        return Outputs(shared={**joint, "first": first, "second": second})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shares; batch norm in the head sees one view of all ranks at a time."""
        first, second = self.projector(shared["first"]), self.projector(shared["second"])
        return {
            "contrastive": clip_loss(shared["image"], shared["text"], self.logit_scale.exp()),
            # SLIP averages the two directions that SimCLR adds.
            "views": nt_xent(first, second, self.config.views_temperature) / 2,
        }

    def weights(self) -> dict[str, float]:
        """Return the weight of SimCLR's loss."""
        return {"views": self.config.views_weight}

    def no_weight_decay(self) -> set[str]:
        """Exempt what is called a bias, as the source does, besides gains and biases; tokens and tables decay."""
        return {name for name, _ in self.named_parameters() if "bias" in name}

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale between 1 and `max_scale`."""
        self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def report(self) -> dict[str, float]:
        """Return the inverse temperature of images and texts."""
        return {"scale": self.logit_scale.exp().item()}
