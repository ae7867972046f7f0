"""iBOT: DINO, and the same for masked patches (Zhou et al. 2022; specification B9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import world
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.masks import block_mask
from altsight.data.multicrop import MultiCropConfig, MultiCropPrepare, dino_views
from altsight.data.views import Crop
from altsight.losses.self_distillation import TargetConfig, Targets, masked_ce_sum, per_crop_sum, view_ce
from altsight.methods.base import Corpus, Method
from altsight.methods.dino import (
    DINO,
    HeadConfig,
    by_sample,
    global_images,
    multi_crop,
    student_views,
    summary_token,
    teacher_head,
)
from altsight.nn.encoder import Encoder
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher, teacher_encoder


@dataclass(frozen=True)
class IBOTPrepare:
    """DINO's views, and mask: (2, L) bool, the patches that are masked in each global view."""

    views: MultiCropPrepare
    grid: tuple[int, int]
    masked_views: float
    mask_ratio: tuple[float, float]

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.views(document, at)
        if example is not None:
            example["mask"] = torch.stack([self._mask(at.child(name)) for name in ("first", "second")])
        return example

    def _mask(self, at: Key) -> Tensor:
        coin, place = at.child("ratio").generator().random(2).tolist()
        low, high = self.mask_ratio
        patches = self.grid[0] * self.grid[1]
        count = int(patches * (low + place * (high - low))) if coin < self.masked_views else 0
        return block_mask(self.grid, count, at, least=(min(self.grid) // 3) ** 2)


class IBOT(Method):
    """DINO whose student sees masked global views, and also predicts the teacher's word for every masked patch.

    L = DINO's loss + the same cross-entropy at the masked patches of the global views, meaned within a view.

    Evaluated like DINO: the teacher, at the mean of the patch tokens.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of iBOT at the source's values for ViT-S. Drop path .1 is --encoder.drop-path."""

        views: MultiCropConfig = field(default_factory=lambda: dino_views((0.25, 1.0), (0.05, 0.25), 10))
        head: HeadConfig = field(default_factory=lambda: HeadConfig(prototypes=8192))
        """One head for CLS tokens and patches."""
        targets: TargetConfig = field(default_factory=TargetConfig)
        patch_targets: TargetConfig = field(default_factory=TargetConfig)
        student_temperature: float = 0.1
        masked_views: float = 0.5
        """Probability that a global view is masked."""
        mask_ratio: tuple[float, float] = (0.1, 0.5)
        """Range of the share of its patches that is then masked, in blocks."""
        teacher_momentum: float = 0.996
        """How much of its weights the teacher keeps at the first step; 1 at the last, on a half cosine."""
        freeze_last_layer: float = 1 / 800
        """Share of the run in which the prototypes stay as they are."""

    optim: ClassVar[OptimConfig] = DINO.optim
    shares: ClassVar[bool] = True
    masked: ClassVar[bool] = True

    def __init__(self, config: IBOT.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.head = config.head.build(encoder.width)
        self.targets = Targets(config.targets, config.head.prototypes)
        self.patch_targets = Targets(config.patch_targets, config.head.prototypes)
        self.mask_token = mask_token(encoder)
        self.teacher = Teacher(self.students())
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
        nn.init.zeros_(self.mask_token)
        self.teacher.copy_from(self.students())

    @property
    def evaluated(self) -> Encoder:
        """The teacher's encoder."""
        return teacher_encoder(self.teacher)

    def prepare(self, crop: Crop, size: int) -> IBOTPrepare:
        """Return the preparation: DINO's views, and for each global one no mask or blocks."""
        views = multi_crop(self.config.views, self.encoder, size)
        grid = (size // self.encoder.patch_size,) * 2
        return IBOTPrepare(views, grid, self.config.masked_views, self.config.mask_ratio)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return unit vectors of the views, as DINO does, and of the M masked patches, by student and teacher.

        masked: (M,) how many patches are masked in the view that the patch is from. teacher_mean: (2 B, bottleneck)
        the mean of the teacher's vectors of all patches of a view.
        """
        large, mask = global_images(self.encoder, batch), view_masks(batch)
        seen = self.encoder(large, mask=mask, mask_token=self.mask_token[0])
        shared = {
            "student": student_views(self.encoder, self.head, seen, batch),
            "student_patches": self.head(seen.patches[mask]),
            "masked": masked_count(mask),
        }
        with torch.no_grad():
            encoder, head = teacher_encoder(self.teacher), teacher_head(self.teacher, "head")
            whole = encoder(large)
            patches = head(whole.patches)
            shared["teacher"] = by_sample(head(summary_token(encoder, whole)), 2)
            shared["teacher_patches"] = patches[mask]
            shared["teacher_mean"] = patches.mean(dim=1)
        return Outputs(shared=shared)

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shares of the cross-entropies between views, and at masked patches."""
        temperature, teacher = self.config.student_temperature, teacher_head(self.teacher, "head")
        with torch.no_grad():
            targets = self.targets(teacher.logits(shared["teacher"]))
            # The centre follows all patches, masked or not. Logits are linear in the vectors: their mean is the mean's.
            mean = teacher.logits(shared["teacher_mean"])
            patch_targets = self.patch_targets(teacher.logits(shared["teacher_patches"]), mean)
        views = view_ce(self.head.logits(shared["student"], self.frozen), targets, temperature)
        student = self.head.logits(shared["student_patches"], self.frozen)
        patches = masked_ce_sum(student, patch_targets, shared["masked"], temperature)
        patch_floor = per_crop_sum(self.patch_targets.entropies, shared["masked"]) / (2 * len(views))
        self.floor = self.targets.entropies.mean() + patch_floor
        samples = world().size * len(views)
        return {"views": views.sum() / samples, "patches": patches / (2 * samples)}

    def start_step(self, at: Progress) -> None:
        """Set the teacher's temperatures, and whether the prototypes move."""
        self.targets.start_step(at)
        self.patch_targets.start_step(at)
        self.frozen = at.fraction < self.config.freeze_last_layer

    def after_step(self, at: Progress) -> None:
        """Let the centres follow the teacher's logits, and the teacher the student."""
        self.targets.follow()
        self.patch_targets.follow()
        self.teacher.follow(self.students(), at.cosine(self.config.teacher_momentum, 1.0))

    def report(self) -> dict[str, float]:
        """Return the teacher's temperature, the entropies of its targets for views, and the floor."""
        return {**self.targets.report(), "floor": float(self.floor)}


def mask_token(encoder: Encoder) -> nn.Parameter:
    """Return a mask token (1, D) for `encoder`: two dimensions, for in the sources it decays like a matrix."""
    return nn.Parameter(torch.empty(1, encoder.width))


def view_masks(batch: Batch) -> Tensor:
    """Return the masks of the global views, view by view: (2 B, L) bool."""
    return batch["mask"].transpose(0, 1).flatten(0, 1)


def masked_count(mask: Tensor) -> Tensor:
    """Return for every masked patch of mask (n, L) how many its row has: (M,) int64."""
    return mask.sum(dim=1, keepdim=True).expand_as(mask)[mask]
