"""The linear probe of MAE and MoCo v3: a linear classifier on frozen features, trained by LARS (specification D3).

Logistic regression by L-BFGS, which most comparisons use, is the evaluator `linear` of `altsight eval`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import gather, start, world
from altsight.core.errors import UserError
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.loader import check_batch
from altsight.data.sources import Source
from altsight.data.views import Crop
from altsight.evals.base import Result, Split, View
from altsight.evals.features import extract
from altsight.methods.base import Method
from altsight.nn.encoder import FeaturePoint
from altsight.train.run import pick_device, weights_hash
from altsight.transfer.base import FitConfig, fit, prepared_for
from altsight.transfer.classify import open_sets, score
from altsight.transfer.features import Features
from altsight.transfer.labels import LabelledImages, Labels

HEAD_STD = 0.01
"""Standard deviation of the classifier's weights at the start (MAE)."""
BLOCK = 256
"""Images that the frozen encoder computes at a time."""
LARS = OptimConfig(name="lars", lr=0.1, betas=(0.9, 0.999), weight_decay=1e-12, warmup_fraction=10 / 90)
"""MAE's: momentum 0.9, a learning rate of 0.1 for every 256 images of a batch, 10 of 90 epochs of warm-up.

timm's LARS adapts the rates of those tensors only that decay: the decay is there for that, and too small to be felt.
"""


@dataclass(frozen=True)
class LinearProbeConfig:
    """What a linear probe is, and what it sees in training; part of what its run is identified by."""

    weights: str
    """Hash of the frozen encoder."""
    feature_point: str
    preprocess: str
    crop: Crop | None
    """Random views; None: features of every image as it is evaluated."""
    norm: bool


@dataclass(frozen=True)
class LinearProbe:
    """Train a linear classifier on frozen features, and score it on other images."""

    data: str
    """Training images: a folder of class folders, tars, Parquet, tables, as `altsight prepare` takes them."""
    test: str
    """Images that the classifier is scored on, in any of these layouts."""
    val: str = ""
    """Further images that it is scored on, to choose settings by."""
    label: str = "label"
    """Field with the class; "label" in a folder of class folders."""
    feature_point: FeaturePoint | None = None
    """Which vector of an image is classified; None: the one that the weights' own method is evaluated by."""
    augment: bool = False
    """See a new crop of every image each time, as the sources do; otherwise features are extracted once."""
    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    norm: bool = True
    """Batch norm without scale and shift before the linear map (MAE); MoCo v3 has none."""
    features: str = ""
    """Folder where features are kept for other commands; empty: in the folder of the probe."""
    optim: OptimConfig = LARS
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=90, batch=16_384, checkpoint_every=5_000_000))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return top-1, top-5 and mean-per-class accuracy of the val and the test set.

        Raises:
            UserError: a set or a setting cannot be used.
        """
        if self.fit.micro_batch:
            raise UserError(
                f"the encoder computes {BLOCK} images of a batch at a time anyway: leave --fit.micro-batch at 0."
            )
        # Extraction is shared by the ranks, so they have to know each other before the training.
        start(pick_device(self.fit.device))
        train, held_out = open_sets(self.data, self.val, self.test, Labels(self.label))
        check_batch(self.fit.batch, len(train), self.data)
        store = view.store or Path(self.features or out / "features")
        view = replace(view, feature_point=self.feature_point or view.feature_point, store=store, cache={})
        crop = self.crop if self.augment else None
        config = LinearProbeConfig(
            weights_hash(view.encoder), view.feature_point, view.preprocess.hash(), crop, self.norm
        )
        source: Source = train if self.augment else _features(view, train)
        model = fit(
            "linear_probe",
            lambda: LinearClassifier(config, view, len(train.classes), key(self.fit.seed, 0, "linear probe")),
            config,
            self.optim,
            self.fit,
            prepared_for(source, Path(self.data), train.digest()),
            out,
        )
        assert isinstance(model, LinearClassifier)
        return [
            result
            for split, images in held_out.items()
            for result in score(view, model.logits, images, split, "linear_probe", self.fit.seed)
        ]


def _features(view: View, images: LabelledImages) -> Features:
    """Return the features of those images that can be decoded and have a class."""
    extracted = extract(view, Split("train", images.pairs))
    rows = [row for row, sample in enumerate(extracted.kept) if images.ids(sample)]
    samples = [extracted.kept[row] for row in rows]
    ids, names = tuple(map(images.ids, samples)), tuple(map(images.name, samples))
    return Features(extracted.vectors[rows], ids, names, images.classes)


@dataclass(frozen=True)
class ProbePrepare:
    """Document -> image: uint8 (3, size, size), or features: fp32 (D,); label: 0-d int64. None without a class."""

    crop: Crop | None
    size: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.meta["classes"]:
            return None
        label = torch.tensor(document.meta["classes"][0])
        if self.crop is None:
            return {"features": document.meta["features"], "label": label}
        return {"image": self.crop(document.images[0], self.size, at), "label": label}


class LinearClassifier(Method):
    """A frozen encoder, batch norm over the global batch, and a linear map.

    L = CE of the label.
    """

    optim: ClassVar[OptimConfig] = LARS
    shares: ClassVar[bool] = True
    # Batch norm of a single row is not defined.
    least_batch: ClassVar[int] = 2

    def __init__(self, config: LinearProbeConfig, view: View, classes: int, at: Key) -> None:
        super().__init__(copy.deepcopy(view.encoder).requires_grad_(False))
        self.config, self.point = config, view.feature_point
        blank = torch.zeros(1, 3, *2 * [view.preprocess.size], dtype=torch.uint8)
        width = self._features(blank.to(view.device)).shape[1]
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False) if config.norm else nn.Identity()
        self.head = nn.Linear(width, classes)
        with torch_seeded(at):
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearClassifier:
        """Switch all but the encoder to training mode; returns self."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the scores (n, classes) of features (n, D), fp32 on the features' device."""
        found: Tensor = self.head(self.norm(features.to(self.head.weight.device)))
        return found.to(features.device)

    def prepare(self, crop: Crop, size: int) -> ProbePrepare:
        """Return the preparation; the crop is the probe's own."""
        return ProbePrepare(self.config.crop, size)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the features of images, or those that were extracted before."""
        known = batch.get("features")
        features = self._features(batch["image"]) if known is None else known
        return Outputs(shared={"features": features, "label": batch["label"]})

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        blocks = self.encoder.eval().normalize(images).split(BLOCK)
        return torch.cat([self.encoder.point(self.encoder(block), self.point).float() for block in blocks])

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share; the statistics of the norm are those of all ranks' rows."""
        rows, count = gather(shared["features"]), len(shared["features"])
        own = self.norm(rows)[world().rank * count :][:count]
        loss = F.cross_entropy(self.head(own), shared["label"], reduction="sum")
        return {"classification": loss / len(rows)}
