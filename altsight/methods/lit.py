"""LiT: a text tower learns to read a locked image tower (Zhai et al. 2022, locked-image tuning; specification A6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig, read_json
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs
from altsight.data.views import Crop
from altsight.losses.contrastive import clip_loss
from altsight.methods import find
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.nn.encoder import Encoded, Encoder, FeaturePoint
from altsight.nn.language import PretrainedTower
from altsight.nn.text import TextConfig, TextTower
from altsight.nn.weights import load_encoder


def _text() -> TextConfig:
    """Return CLIP's text tower over the 16 tokens that the source finds enough."""
    return TextConfig(context=16)


class LiT(Method):
    """Dual encoder whose image tower, trained before, is locked: no gradient, no dropout, no map on top of it.

    L = 1/2 [CE over the texts given an image + CE over the images given a text] of s * cosine.

    The texts are mapped to the width of the encoder. The shared encoder is what is locked, so a run with
    `locked` does not start like the other methods, and is no arm of a study.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of LiT's public recipe (CC12M)."""

        locked: str = ""
        """Weights of the image tower: the folder of a run (of what it evaluates, its teacher's where that is one), a
        .safetensors or .pt file of an encoder's state, or timm: its pre-trained weights of --encoder.model. Empty: the
        encoder stays as it was drawn, which is good for nothing but a control."""
        image_feature: FeaturePoint = "mean"
        """What of the image tower is matched with texts; cls or pooled where it was trained to be read there."""
        text: TextConfig = field(default_factory=_text)
        """Size of a text tower that starts from random weights; of a pre-trained one the context alone."""
        text_model: str = ""
        """A pre-trained text tower: name or folder of a BERT for transformers; needed again wherever the run is
        loaded, for its configuration. Empty: `text`. The source takes BERT-base."""
        scale: float = 10.0
        """What the cosines are multiplied by at the start; learned from there."""

    # 2,000 of 12,000 steps of warm-up. The source's decay of 1e-4 is not multiplied by the learning rate, which torch
    # does: 1e-4 / 1e-3. Its private recipe has none.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-3, lr_base_batch=0, weight_decay=0.1, betas=(0.9, 0.999), warmup_fraction=2 / 12, clip_norm=1.0
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: TextTower | PretrainedTower

    def __init__(self, config: LiT.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("lit")
        if config.text_model:
            self.text = PretrainedTower(config.text_model, self.tokenizer, config.text.context, encoder.width)
        else:
            self.text = TextTower(config.text, self.tokenizer, encoder.width)
        self.log_scale = nn.Parameter(torch.empty(()))
        encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> LiT:
        """Switch all but the encoder to training mode; returns self."""
        super().train(mode)
        self.encoder.eval()
        return self

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`, and the encoder's and a pre-trained text tower's from their files.

        Raises:
            UserError: these are missing, or of another shape.
        """
        super().init_weights(at)
        if self.config.locked:
            load_encoder(self.encoder, self.config.locked, _evaluated_part(self.config.locked))
        self.text.init_weights(at.child("text"))
        nn.init.constant_(self.log_scale, math.log(self.config.scale))

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the text's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.text.context)

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the encoder's feature (B, D), un-normalised."""
        return self.encoder.point(encoded, self.config.image_feature)

    def similarity(self) -> tuple[float, float]:
        """Return the learned scale, and no bias."""
        return float(self.log_scale.detach().exp()), 0.0

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the un-normalised features of images and texts, (B, D) each; the former without a gradient."""
        with torch.no_grad():
            image = self.embed_image(self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible")))
        return Outputs(shared={"image": image, "text": self.text(batch["text"])})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of CLIP's contrastive loss."""
        return {"contrastive": clip_loss(shared["image"], shared["text"], self.log_scale.exp())}

    def no_weight_decay(self) -> set[str]:
        """Exempt all that is no map: the text tower's tables of words and positions."""
        tables = {name for name, module in self.text.named_modules() if isinstance(module, nn.Embedding)}
        names = {f"text.{name}.weight" for name in tables}
        return names | ({"text.positional_embedding"} if isinstance(self.text, TextTower) else set())

    def report(self) -> dict[str, float]:
        """Return the inverse temperature."""
        return {"scale": self.log_scale.exp().item()}


def _evaluated_part(locked: str) -> str:
    """Return what the names of the evaluated encoder's weights begin with, in the checkpoints of a run."""
    run = Path(locked) / "run.json"
    settings: Any = read_json(run) if run.is_file() else {}
    name = settings.get("name")
    student = name is None or find(name).evaluated is Method.evaluated
    return "encoder." if student else "teacher.encoder."
