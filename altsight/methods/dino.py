"""DINO: predict a slow copy's view of an image from other views of it (Caron et al. 2021; specification B8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import world
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.multicrop import MultiCropConfig, MultiCropPrepare, coloured, dino_views
from altsight.data.views import Crop
from altsight.losses.self_distillation import TargetConfig, Targets, view_ce
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.heads import PrototypeHead
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher, teacher_encoder


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head: three maps to a unit vector, and its products with the prototypes."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    norm_last_layer: bool = False
    """Keep the prototypes at length 1: steadier, DINO's choice for ViT-B; learned lengths are better for ViT-S."""

    def build(self, width: int) -> PrototypeHead:
        """Return the head for features of `width`."""
        return PrototypeHead(
            width, self.hidden, self.bottleneck, self.prototypes, trained_norm=not self.norm_last_layer
        )


class DINO(Method):
    """Self-distillation without labels over global and local views.

    L = mean over pairs of different views of H(softmax((t - c) / T_t), softmax(s / T_s)): t the teacher's logits of a
    global view, s the student's of any, c the centre.

    The loss reads the CLS token, as in the paper (the mean of the patch tokens where an encoder has no such token).
    What is evaluated is the teacher, at the mean of the patch tokens like every other method; DINO's own reading is
    the feature point "cls". The study's crop is not used: the shares that views keep are part of the method.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of DINO at the source's values for ViT-S. Drop path .1 is --encoder.drop-path."""

        views: MultiCropConfig = field(default_factory=lambda: dino_views((0.4, 1.0), (0.05, 0.4), 8))
        """The best runs take scales (.25, 1) and (.05, .25), and 10 local views."""
        head: HeadConfig = field(default_factory=HeadConfig)
        targets: TargetConfig = field(default_factory=TargetConfig)
        student_temperature: float = 0.1
        teacher_momentum: float = 0.996
        """How much of its weights the teacher keeps at the first step; 1 at the last, on a half cosine."""
        freeze_last_layer: float = 1 / 800
        """Share of the run in which the prototypes stay as they are."""

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=5e-4,
        lr_base_batch=256,
        weight_decay=0.04,
        final_weight_decay=0.4,
        betas=(0.9, 0.999),
        warmup_fraction=10 / 800,
        min_lr=1e-6,
        clip_norm=3.0,
        clip="tensor",
    )
    shares: ClassVar[bool] = True

    def __init__(self, config: DINO.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.head = config.head.build(encoder.width)
        self.targets = Targets(config.targets, config.head.prototypes)
        # Batch norm in a teacher has no statistics but those that it sees itself.
        self.teacher = Teacher(self.students(), follows_mode=encoder.normalizes_batch)
        self.frozen = False
        self.floor = torch.zeros(())

    def students(self) -> Mapping[str, nn.Module]:
        """Return what the teacher follows, by name."""
        return {"encoder": self.encoder, "head": self.head}

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`; the teacher starts as the student."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.head)
        self.teacher.copy_from(self.students())

    @property
    def evaluated(self) -> Encoder:
        """The teacher's encoder."""
        return teacher_encoder(self.teacher)

    def prepare(self, crop: Crop, size: int) -> MultiCropPrepare:
        """Return the preparation: two global views of `size` and the local ones."""
        return multi_crop(self.config.views, self.encoder, size)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return unit vectors (B, V, bottleneck) of the student's views and (B, 2, bottleneck) of the teacher's."""
        large = global_images(self.encoder, batch)
        student = student_views(self.encoder, self.head, self.encoder(large), batch)
        with torch.no_grad():
            encoder = teacher_encoder(self.teacher)
            teacher = self.teacher["head"](summary_token(encoder, encoder(large)))
        return Outputs(shared={"student": student, "teacher": by_sample(teacher, 2)})

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the cross-entropy between views."""
        student = self.head.logits(shared["student"], self.frozen)
        with torch.no_grad():
            targets = self.targets(teacher_head(self.teacher, "head").logits(shared["teacher"]))
        self.floor = self.targets.entropies.mean()
        ce = view_ce(student, targets, self.config.student_temperature)
        return {"views": ce.sum() / (world().size * len(ce))}

    def start_step(self, at: Progress) -> None:
        """Set the teacher's temperature, and whether the prototypes move."""
        self.targets.start_step(at)
        self.frozen = at.fraction < self.config.freeze_last_layer

    def after_step(self, at: Progress) -> None:
        """Let the centre follow the teacher's logits, and the teacher the student."""
        self.targets.follow()
        self.teacher.follow(self.students(), at.cosine(self.config.teacher_momentum, 1.0))

    def report(self) -> dict[str, float]:
        """Return the teacher's temperature, the entropies of its targets, and the floor."""
        return {**self.targets.report(), "floor": float(self.floor)}


def multi_crop(views: MultiCropConfig, encoder: Encoder, size: int) -> MultiCropPrepare:
    """Return the preparation of `views` with global ones of `size` pixels for `encoder`.

    Raises:
        UserError: the local views cannot be cut into patches.
    """
    # A convolutional encoder has no patches; its last stage has one value for so many pixels.
    unit = encoder.patch_size or encoder.config.img_size // encoder.grid[0]
    return MultiCropPrepare(views, size, views.side(size, unit))


def global_images(encoder: Encoder, batch: Batch) -> Tensor:
    """Return the global views, coloured and normalised: (2 B, 3, size, size), view by view."""
    return encoder.normalize(coloured(batch["image"], batch["colour"]))


def by_sample(rows: Tensor, views: int) -> Tensor:
    """Return rows (views * B, ...), view by view, as (B, views, ...)."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def summary_token(encoder: Encoder, encoded: Encoded) -> Tensor:
    """Return (B, D): the CLS token, or the mean of the patch tokens where the encoder has no CLS token."""
    has_cls = getattr(encoder.backbone, "cls_token", None) is not None
    return encoder.point(encoded, "cls" if has_cls else "mean")


def student_views(encoder: Encoder, head: PrototypeHead, seen: Encoded, batch: Batch) -> Tensor:
    """Return the unit vectors (B, V, bottleneck) of the global views in `seen`, then of the local ones of `batch`."""
    views = [by_sample(head(summary_token(encoder, seen)), 2)]
    if "local" in batch.tensors:
        images = encoder.normalize(coloured(batch["local"], batch["local_colour"]))
        views.append(by_sample(head(summary_token(encoder, encoder(images))), batch["local"].shape[1]))
    return torch.cat(views, dim=1)


def teacher_head(teacher: Teacher, name: str) -> PrototypeHead:
    """Return the head called `name` in `teacher`."""
    return cast(PrototypeHead, teacher[name])
