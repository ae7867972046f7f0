"""MUST's training: a student on masked strong views, a slow teacher on weak ones, four losses and no label.

Li et al. 2022, "Masked Unsupervised Self-training for Label-free Image Classification" (specification 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import sum_over_ranks, world
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.decode import Box
from altsight.data.masks import masked_units, unit_mask
from altsight.data.staged import rand_augment
from altsight.data.views import Crop, crops
from altsight.evals.base import View
from altsight.losses.pixels import patchify
from altsight.losses.selftrain import (
    UNSURE,
    fairness,
    log_mean_prediction,
    masked_alignment_sum,
    pseudo_ce_sum,
    pseudo_labels,
)
from altsight.methods.base import Method
from altsight.methods.mae import inference
from altsight.methods.simmim import fill_in, masked_l1_sum
from altsight.nn.init import normal, reset
from altsight.nn.momentum import Teacher
from altsight.transfer.base import ImageTower, name_of_projection

MANY_CLASSES = 512
"""From so many classes on, a batch is too small to use all of them, and the mean prediction is a running one."""


@dataclass(frozen=True)
class MUSTConfig:
    """Hyper-parameters of MUST at the source's values for ImageNet and ViT-B/16."""

    threshold: float = 0.7
    """Confidence above which the teacher's answer becomes a pseudo-label."""
    fairness: float = 1.0
    """Weight of the loss that keeps all classes in use; 0: self-training alone."""
    pixels: float = 1.0
    """Weight of the loss on the pixels of the masked patches."""
    align: float = 0.2
    """Weight of the loss that draws masked patches and their image together in the joint space."""
    mask_block: int = 32
    """Side of a masked square, in pixels."""
    mask_ratio: float = 0.3
    """Share of the squares that is masked, rounded up; 0: none are, and the losses on masked patches go."""
    ema: tuple[float, float] = (0.999, 0.9998)
    """How much of its weights the teacher keeps: at the first step, and from `warm_steps` on."""
    warm_steps: int = 2000
    """Optimizer steps in which that rises, on a line."""
    scale: float = 100.0
    """What cosines are multiplied with; constant."""
    crop: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that the student's crop keeps."""
    flip: bool = True
    """Mirror half of the student's views."""
    magnitude: int = 9
    """Of RandAugment on the student's views; 0: none. It changes colours: leave it out where they tell classes."""


@dataclass(frozen=True)
class WeakCrop(Crop):
    """The largest square at a random place: the shorter side resized, then a random crop (the teacher's view)."""

    flip: bool = False

    def box(self, height: int, width: int, at: Key) -> Box:
        """Return the part of an image of `height` x `width` pixels that the crop keeps."""
        side = min(height, width)
        down, right = at.child("crop").generator().random(2).tolist()
        return int(down * (height - side + 1)), int(right * (width - side + 1)), side, side


@dataclass(frozen=True)
class MUSTPrepare:
    """Document -> weak, strong: uint8 (3, size, size); mask: (L,) bool of squares, unless nothing is masked.

    Only the image of the document is looked at. unit: side of a square in patches.
    """

    config: MUSTConfig
    size: int
    grid: tuple[int, int]
    unit: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        strong = Crop(scale=self.config.crop, flip=self.config.flip)
        views = [(WeakCrop(), self.size, at.child("weak")), (strong, self.size, at.child("strong"))]
        weak, view = crops(document.images[0], views)
        if self.config.magnitude:
            view = rand_augment(view, self.config.magnitude, at)
        example = {"weak": weak, "strong": view}
        if self.config.mask_ratio:
            example["mask"] = unit_mask(self.grid, self.unit, self.config.mask_ratio, at)
        return example


class MUST(Method):
    """Self-training of the image side of a dual encoder and of a classifier that starts as its class vectors.

    L = CE of the confident pseudo-labels + w_fair fairness + w_pixels pixels + w_align alignment. Pseudo-labels and the
    mean prediction are those of the global batch.

    Args:
        view: a dual encoder; it is copied.
        classifier: (C, E) a unit vector for each class, which is trained on.

    Raises:
        UserError: the view has no text tower, or cannot be masked or aligned as asked.
    """

    # The least rate is 1e-6 for 256 images; the learning rates are those of the source's batch of 1,024.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=2e-5,
        lr_base_batch=256,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup_fraction=0.0,
        min_lr=4e-6,
        layer_decay=0.65,
    )
    Config = MUSTConfig
    shares: ClassVar[bool] = True
    teacher: Teacher
    log_average: Tensor

    def __init__(self, config: MUSTConfig, view: View, classifier: Tensor) -> None:
        tower = ImageTower(view)
        super().__init__(tower.encoder)
        self.config, self.tower = config, tower
        classes, dim = classifier.shape
        self.classifier = nn.Linear(dim, classes, bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(classifier)
        if config.mask_ratio:
            _check_mask(config, view)
            self.project: nn.Module = _projection(view, tower)
            self.mask_token = nn.Parameter(torch.empty(self.encoder.width))
            self.patch_norm = nn.LayerNorm(self.encoder.width)
            # A 1 x 1 convolution and a pixel shuffle, as the source has it, are this map for every patch.
            self.decoder = nn.Linear(self.encoder.width, 3 * self.encoder.patch_size**2)
        self.teacher = Teacher(self.students())
        self.register_buffer("log_average", torch.full((classes,), -math.inf))
        self.log_mean = torch.zeros(classes)
        self.confident = torch.zeros(())

    def students(self) -> Mapping[str, nn.Module]:
        """Return what the teacher follows, by name."""
        return {"tower": self.tower, "classifier": self.classifier}

    def init_weights(self, at: Key) -> None:
        """Set what the view does not bring, from `at`: the mask token, the norm of the patches and the decoder."""
        if self.config.mask_ratio:
            with torch_seeded(at.child("must")):
                normal(self.mask_token)
                reset(self.patch_norm)
                reset(self.decoder)

    def prepare(self, crop: Crop, size: int) -> MUSTPrepare:
        """Return the preparation: a weak and a strong view of MUST's own crops, and a mask."""
        unit = self.config.mask_block // self.encoder.patch_size if self.config.mask_ratio else 0
        return MUSTPrepare(self.config, size, self.encoder.grid, unit)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches."""
        mask = batch.get("mask")
        return {} if mask is None else {"pixels": mask.sum(), "align": mask.sum()}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the vectors (B, E) of the student's strong and the teacher's weak views, and the patches' losses."""
        with torch.no_grad():
            follower = cast(ImageTower, self.teacher["tower"])
            weak = follower(follower.encoder(self.encoder.normalize(batch["weak"])))
        images, mask = self.encoder.normalize(batch["strong"]), batch.get("mask")
        if mask is None:
            return Outputs({"student": self.tower(self.encoder(images)), "teacher": weak})
        encoded = self.encoder(images, mask=mask, mask_token=self.mask_token)
        student = self.tower(encoded)
        patches = self.patch_norm(encoded.prenorm[:, encoded.prefix :])
        local = {
            "pixels": masked_l1_sum(self.decoder(patches), patchify(images, self.encoder.patch_size), mask),
            "align": masked_alignment_sum(self.project(patches), student, mask),
        }
        return Outputs({"student": student, "teacher": weak}, local)

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the cross-entropy of pseudo-labels, and of the fairness of predictions."""
        logits = self.logits(shared["student"])
        with torch.no_grad():
            teacher = self.config.scale * self.teacher["classifier"](F.normalize(shared["teacher"].float(), dim=-1))
            labels = pseudo_labels(teacher, self.config.threshold)
            confident = sum_over_ranks((labels != UNSURE).sum())
        log_mean, weight = log_mean_prediction(logits), 1.0
        if len(log_mean) >= MANY_CLASSES:
            # Half of the mean so far and half of this batch's, whose gradient then keeps its size.
            log_mean, weight = torch.logaddexp(self.log_average, log_mean) - math.log(2), 2.0
        self.log_mean = log_mean.detach()
        self.confident = confident / (world().size * len(labels))
        return {
            # Without a confident image the sum is 0, and so is the loss.
            "pseudo": pseudo_ce_sum(logits, labels) / confident.clamp_min(1),
            "fairness": weight * fairness(log_mean) / world().size,
        }

    def logits(self, vectors: Tensor) -> Tensor:
        """Return the student's logits (B, C) of un-normalised image vectors (B, E), in fp32."""
        return self.config.scale * self.classifier(F.normalize(vectors.float(), dim=-1))

    def weights(self) -> dict[str, float]:
        """Return the weights of the losses."""
        return {"fairness": self.config.fairness, "pixels": self.config.pixels, "align": self.config.align}

    def after_step(self, at: Progress) -> None:
        """Let the teacher and the running mean prediction follow."""
        start, end = self.config.ema
        ramp = min(1.0, at.step / max(self.config.warm_steps, 1))
        self.teacher.follow(self.students(), start + (end - start) * ramp)
        self.log_average.copy_(self.log_mean)

    def report(self) -> dict[str, float]:
        """Return the share of the last batch that got a pseudo-label, and how many classes are in use.

        The latter is the exponential of the mean prediction's entropy: all classes where they are used evenly.
        """
        entropy = -(self.log_mean.exp() * self.log_mean).sum()
        return {"confident": float(self.confident), "classes": float(entropy.exp())}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the strong views of `batch`, their masked patches as predicted: (B, 3, H, W) fp32 in [0, 1]."""
        with inference(self):
            images, mask = self.encoder.normalize(batch["strong"]), batch["mask"]
            encoded = self.encoder(images, mask=mask, mask_token=self.mask_token)
            pixels = self.decoder(self.patch_norm(encoded.prenorm[:, encoded.prefix :]))
            return fill_in(pixels, images, mask, self.encoder)


def _check_mask(config: MUSTConfig, view: View) -> None:
    """Raise UserError if the squares do not fit the patches, or there are no patches."""
    encoder = view.encoder
    if not encoder.is_vit:
        raise UserError(
            f"MUST masks patches, and '{encoder.config.model}' has none: set --must.mask-ratio 0, or use a ViT."
        )
    patch, (rows, columns) = encoder.patch_size, encoder.grid
    unit = config.mask_block // patch
    if config.mask_block % patch or not unit or rows % unit or columns % unit:
        sides = [n * patch for n in range(1, rows + 1) if rows % n == 0 and columns % n == 0]
        near = min(sides, key=lambda side: abs(side - config.mask_block))
        raise UserError(
            f"squares of {config.mask_block} pixels are not made up of whole patches of {patch} pixels, {rows} x "
            f"{columns} of them: set --must.mask-block {near}."
        )
    squares = rows * columns // unit**2
    if not 0 < masked_units(encoder.grid, unit, config.mask_ratio) < squares:
        raise UserError(
            f"a mask ratio of {config.mask_ratio:g} must leave some of the {squares} squares visible: change "
            "--must.mask-ratio or --must.mask-block."
        )


def _projection(view: View, tower: ImageTower) -> nn.Module:
    """Return the map of `tower` from tokens to the joint space, the copy of `view.project`."""
    if name := name_of_projection(view):
        return tower.owner.get_submodule(name)
    raise UserError(
        f"'{view.name}' has no map of single patches to the joint space, so they cannot be aligned with their image: "
        "set --must.mask-ratio 0."
    )
