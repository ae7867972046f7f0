"""End-to-end fine-tuning on labelled images: BEiT's and MAE's recipe (specification D5), from any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import world
from altsight.core.errors import UserError
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.views import Crop
from altsight.evals.base import Result, View
from altsight.evals.encoder_file import write_encoder
from altsight.methods.base import Method
from altsight.nn.encoder import Encoder, FeaturePoint
from altsight.nn.resample import resized
from altsight.train.run import weights_hash
from altsight.transfer.augment import Augment, Mixing
from altsight.transfer.base import FitConfig, fit, prepared_for, with_view
from altsight.transfer.classify import open_sets, score
from altsight.transfer.labels import Labels

HEAD_STD = 2e-5
"""Standard deviation of the classifier's weights at the start (MAE): all classes are all but equally likely then."""
RECIPE = OptimConfig(
    lr=5e-4, weight_decay=0.05, betas=(0.9, 0.999), warmup_fraction=0.05, min_lr=1e-6, layer_decay=0.65
)
"""MAE's for ViT-B: a learning rate of 5e-4 for every 256 images of a batch, 5 of 100 epochs of warm-up."""

Pool = Literal["mean", "cls"]


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuned classifier is, and what it sees in training; part of what its run is identified by."""

    weights: str
    """Hash of the encoder that it starts from."""
    img_size: int
    drop_path: float
    pool: Pool
    multi_label: bool
    label_smoothing: float
    augment: Augment
    mixing: Mixing


@dataclass(frozen=True)
class Finetune:
    """Train encoder and classifier together on labelled images, and score them on others."""

    data: str
    """Training images: a folder of class folders, tars, Parquet, tables, as `altsight prepare` takes them."""
    test: str
    """Images that the classifier is scored on, in any of these layouts."""
    val: str = ""
    """Further images that it is scored on, to choose settings by."""
    label: str = "label"
    """Field with the class; "label" in a folder of class folders."""
    multi_label: bool = False
    """An image has any number of classes: the field holds a list, or a text that `separator` divides."""
    separator: str = ","
    img_size: int = 0
    """Side of the images in pixels; positions are interpolated. 0: the encoder's own."""
    pool: Pool = "mean"
    """What a ViT's classifier reads: the mean patch through a new LayerNorm that takes the place of the last one (MAE),
    or the CLS token. Other backbones are pooled as timm does."""
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes; none with several labels."""
    crop_ratio: float = 0.875
    """What is scored is the middle 224 of 256 pixels, at any size."""
    augment: Augment = field(default_factory=Augment)
    mixing: Mixing = field(default_factory=Mixing)
    optim: OptimConfig = RECIPE
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch=1024))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return top-1, top-5 and mean-per-class accuracy, or the mAP, of the val and the test set.

        Besides what training writes, `out` gets encoder.safetensors, which `altsight load` reads, and
        classifier.safetensors.

        Raises:
            UserError: a set or a setting cannot be used; nothing has been written then.
        """
        labels = Labels(self.label, self.multi_label, self.separator)
        train, held_out = open_sets(self.data, self.val, self.test, labels)
        config = self._config(view)
        model = fit(
            "finetune",
            lambda: Classifier(config, view.encoder, len(train.classes), key(self.fit.seed, 0, "finetune")),
            config,
            self.optim,
            self.fit,
            prepared_for(replace(train, partners=self.mixing.is_on), Path(self.data), train.digest()),
            out,
        )
        assert isinstance(model, Classifier)
        tuned = model.as_view(view, self.crop_ratio)
        if world().is_main:
            write_encoder(tuned, out / "encoder.safetensors")
            model.write_head(out / "classifier.safetensors", train.classes)
        return [
            result
            for split, images in held_out.items()
            for result in score(tuned, model.logits, images, split, "finetune", self.fit.seed)
        ]

    def _config(self, view: View) -> FinetuneConfig:
        if self.img_size < 0:
            raise UserError(f"images have no side of {self.img_size} pixels: give --img-size a positive number.")
        if not 0 < self.crop_ratio <= 1:
            raise UserError(
                f"crop_ratio is the share of a side that is scored, above 0 and at most 1, not {self.crop_ratio}."
            )
        for name in ("drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is a share from 0 to less than 1, not {getattr(self, name)}.")
        size, patch = self.img_size or view.encoder.config.img_size, view.encoder.patch_size
        if patch and size % patch:
            near = size // patch * patch
            raise UserError(
                f"images of {size} pixels cannot be cut into patches of {patch}: use --img-size {near or patch} or "
                f"{near + patch}."
            )
        if not view.encoder.is_vit and self.optim.layer_decay != 1:
            raise UserError(f"'{view.encoder.config.model}' has no layers that are counted: use --optim.layer-decay 1.")
        return FinetuneConfig(
            weights_hash(view.encoder),
            size,
            self.drop_path,
            self.pool,
            self.multi_label,
            self.label_smoothing,
            self.augment,
            self.mixing,
        )


@dataclass(frozen=True)
class FinetunePrepare:
    """Document -> image: fp32 (3, size, size), normalised; target: fp32 (classes,). None without a class.

    With several labels an image without any is one of none of the classes.
    """

    config: FinetuneConfig
    classes: int
    size: int
    normalization: str

    def __call__(self, document: Document, at: Key) -> Example | None:
        first = self._view(document.images[0], document.meta["classes"], at)
        if first is not None and self.config.mixing.draws(at):
            second = self._view(document.images[1], document.meta["partner"], at.child("partner"))
            first = None if second is None else self.config.mixing(first, second, at)
        return None if first is None else {"image": first[0], "target": first[1]}

    def _view(self, data: bytes, ids: tuple[int, ...], at: Key) -> tuple[Tensor, Tensor] | None:
        if not ids and not self.config.multi_label:
            return None
        target = torch.zeros(self.classes)
        target[list(ids)] = 1
        if not self.config.multi_label:
            smoothing = self.config.label_smoothing
            target = (1 - smoothing) * target + smoothing / self.classes
        return self.config.augment(data, self.size, self.normalization, at), target


class Classifier(Method):
    """An encoder and a linear classifier on it, trained together.

    L = CE of the target, which may be a mixture; with several labels the mean over classes of the binary CE.
    """

    optim: ClassVar[OptimConfig] = RECIPE

    def __init__(self, config: FinetuneConfig, encoder: Encoder, classes: int, at: Key) -> None:
        # Positions are learned from here on, whatever they were.
        learned = {"positions": "learned"} if encoder.config.positions == "sincos" else {}
        super().__init__(resized(encoder, img_size=config.img_size, drop_path=config.drop_path, **learned))
        self.config, self.classes = config, classes
        width = self._width()
        own_norm = self.encoder.is_vit and config.pool == "mean"
        self.norm = nn.LayerNorm(width, eps=1e-6) if own_norm else nn.Identity()
        self.head = nn.Linear(width, classes)
        with torch_seeded(at):
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def _width(self) -> int:
        """Return the width of what the classifier reads; freeze what that does not depend on (a norm, a pooling)."""
        size, device = self.encoder.config.img_size, next(self.encoder.parameters()).device
        with torch.enable_grad():
            blank = torch.zeros(1, 3, size, size, device=device)
            features = self.encoder.point(self.encoder.eval()(blank), self.point)
        wanted = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(features.sum(), wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, found, strict=True):
            parameter.requires_grad_(gradient is not None)
        return features.shape[1]

    @property
    def point(self) -> FeaturePoint:
        """What the classifier reads of the encoder, before its own norm."""
        if not self.encoder.is_vit:
            return "pooled"
        return "mean_prenorm" if self.config.pool == "mean" else "cls"

    def as_view(self, view: View, crop_ratio: float) -> View:
        """Return `view` with this encoder, and as features what the classifier reads."""
        tuned = with_view(view, self.encoder, feature_point=self.point, text=None, embed_image=None, project=None)
        return replace(tuned, preprocess=replace(tuned.preprocess, crop_ratio=crop_ratio))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the scores (n, classes) of features (n, D), fp32 on the features' device."""
        device = self.head.weight.device
        return self.head(self.norm(features.to(device))).float().to(features.device)

    def write_head(self, path: Path, names: tuple[str, ...]) -> None:
        """Write what comes after the encoder, with the names of the classes in the file's metadata."""
        state = {name: value.cpu() for name, value in self.state_dict().items() if not name.startswith("encoder.")}
        save_file(state, path, metadata={"classes": json.dumps(names), "feature_point": self.point})

    def prepare(self, crop: Crop, size: int) -> FinetunePrepare:
        """Return the preparation; `crop` is not used, augmentation has one of its own."""
        return FinetunePrepare(self.config, self.classes, size, self.encoder.config.normalization)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count images."""
        return {"classification": batch["target"].new_tensor(len(batch))}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Classify images that are normalised already: erasing and mixing come after that."""
        features = self.encoder.point(self.encoder(batch["image"]), self.point)
        # Losses in fp32 even where the head runs in bf16.
        logits, target = self.head(self.norm(features)).float(), batch["target"]
        if self.config.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / self.classes
        else:
            loss = F.cross_entropy(logits, target, reduction="sum")
        return Outputs(local={"classification": loss})

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
