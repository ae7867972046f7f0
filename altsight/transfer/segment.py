"""Semantic segmentation from any weights: UPerNet trained end to end, or a linear layer on frozen patches (D6)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.mask_views import MaskView
from altsight.data.segmentation import read_splits
from altsight.evals.base import Result, View
from altsight.evals.segmentation import Windows, score
from altsight.nn.dense import LinearHead, is_plain
from altsight.nn.encoder import Encoder
from altsight.nn.resample import resized
from altsight.nn.upernet import UPerNet
from altsight.transfer.base import FitConfig, fit, freeze_unused, keep_encoder, known_by, prepared_for
from altsight.transfer.segmenter import Segmenter, check_segmenting

FIT = FitConfig(epochs=160_000 * 16 / 20_210, batch=16)
"""160,000 iterations of 16 of ADE20K's 20,210 training images."""
OPTIM = OptimConfig(
    lr=7e-4,
    lr_base_batch=16,
    weight_decay=0.05,
    betas=(0.9, 0.999),
    warmup_fraction=1500 / 160_000,
    schedule="linear",
    layer_decay=0.65,
)
"""D6's for a ViT-B; layer decay is for vision transformers only."""
AUXILIARY = 0.4
"""Weight of the FCN's loss."""


@dataclass(frozen=True)
class Segment:
    """Train on images with masks in the layout of ADE20K, and score the mean IoU on others."""

    data: str
    """Folder with images/{training,validation}, annotations/{training,validation} and classes.txt."""
    classes: str = ""
    """File of class names, one a line, in the order of the labels; empty: classes.txt in the folder."""
    head: Literal["upernet", "linear"] = "upernet"
    """upernet: encoder and head are trained; linear: a batch norm and a linear map on the frozen encoder's patches."""
    size: int = 512
    """Side of the training views and of the test's windows, in pixels."""
    reduce_zero_label: bool = True
    """0 in a mask is nothing, and ignored; 1 is the first class. Otherwise 0 is the first class."""
    channels: int = 0
    """Width of UPerNet's head; 0: the encoder's, 512 for networks with stages."""
    layers: int = 1
    """Last blocks that the linear head reads side by side ("+ms" of DINOv2: 4, with --size 640 --multi-scale)."""
    multi_scale: bool = False
    """Average six scales and their mirror images in the test."""
    drop_path: float = 0.1
    """Share of residual branches that the trained encoder drops, in the last block; 0.2 for a ViT-L."""
    view: MaskView = field(default_factory=MaskView)
    optim: OptimConfig = OPTIM
    fit: FitConfig = FIT

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return mean IoU (in `extra` that of every class) and pixel accuracy on the validation images.

        Raises:
            UserError: the data or a setting cannot be used; nothing has been written then.
        """
        if self.head == "upernet" and self.layers != 1:
            raise UserError("--layers is of the linear head, and UPerNet reads four in any case: leave it out.")
        check_segmenting(view.encoder, self.size, self.fit.micro_batch)
        training, validation = read_splits(Path(self.data), self.classes, self.reduce_zero_label)
        method = self._build(view.encoder, len(training.classes))
        identity = known_by(view.encoder, self, training.classes, classes="", multi_scale=False)
        data = prepared_for(training, Path(self.data), training.digest())
        trained = fit("segment", lambda: method, identity, self._optim(view.encoder), self.fit, data, out)
        assert isinstance(trained, Segmenter)
        if self.head == "upernet":
            keep_encoder(view, trained.encoder, out)
        return score(
            trained.logits,
            validation,
            Windows(self.size, view.encoder.config.normalization, self.multi_scale),
            task=Path(self.data).name,
            evaluator=f"segment {self.head}",
            feature_point="patches, frozen" if self.head == "linear" else "four layers, fine-tuned",
            extra={"seed": self.fit.seed},
        )

    def _build(self, encoder: Encoder, classes: int) -> Segmenter:
        linear = self.head == "linear"
        own = resized(encoder, img_size=self.size, drop_path=0.0 if linear else self.drop_path)
        decoder: LinearHead | UPerNet
        if linear:
            decoder = LinearHead(own, classes, self.layers)
        else:
            decoder = UPerNet(own, classes, self.channels or (own.width if is_plain(own) else 512))
        decoder.init_weights(key(self.fit.seed, 0, "init").child("decoder"))
        if not linear:
            # UPerNet reads layers from before the last norm.
            freeze_unused(own, lambda encoded: torch.stack([layer.mean() for layer in encoded.layers]), own)
        return Segmenter(own, decoder, self.view, None if linear else AUXILIARY, frozen=linear)

    def _optim(self, encoder: Encoder) -> OptimConfig:
        # A frozen encoder has no layers to slow down, and a network with stages none that are counted.
        counted = encoder.is_vit and self.head == "upernet"
        return self.optim if counted else replace(self.optim, layer_decay=1.0)
