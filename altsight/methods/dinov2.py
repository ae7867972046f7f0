"""DINOv2: DINO and iBOT together, with features kept apart (Oquab et al. 2023; specification B10, 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import world
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.masks import block_mask, of_196
from altsight.data.multicrop import MultiCropConfig, MultiCropPrepare, dino_views
from altsight.data.views import Crop
from altsight.losses.koleo import koleo
from altsight.losses.self_distillation import TargetConfig, Targets, masked_ce_sum, per_crop_sum, view_ce
from altsight.methods.base import Corpus, Method
from altsight.methods.dino import (
    HeadConfig,
    by_sample,
    global_images,
    multi_crop,
    student_views,
    summary_token,
    teacher_head,
)
from altsight.methods.ibot import mask_token, masked_count, view_masks
from altsight.nn.encoder import Encoder
from altsight.nn.heads import PrototypeHead
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher, teacher_encoder

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples modulo 1 fill [0, 1] evenly, wherever one begins and ends."""


@dataclass(frozen=True)
class DINOv2Prepare:
    """DINO's views, and mask: (2, L) bool, the patches that are masked in each global view.

    One of the two views of every sample is masked, in turn the first and the second; the ratio follows the golden
    section over the positions. So in every batch half of the views are masked, with ratios that cover the range
    evenly. The source deals masks and ratios out over each batch: there, what a sample gets depends on the others.
    """

    views: MultiCropPrepare
    grid: tuple[int, int]
    mask_ratio: tuple[float, float]

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.views(document, at)
        if example is None:
            return None
        patches = self.grid[0] * self.grid[1]
        mask = torch.zeros(2, patches, dtype=torch.bool)
        low, high = self.mask_ratio
        count = int(patches * (low + at.position * GOLDEN % 1 * (high - low)))
        # The source's 4 patches at least, on grids of its own size; fewer on smaller ones.
        mask[at.position % 2] = block_mask(self.grid, count, at, least=min(4, of_196(4, self.grid)))
        return {**example, "mask": mask}


class DINOv2(Method):
    """DINO's and iBOT's losses on one encoding, and KoLeo on the CLS tokens of the global views.

    L = DINO's loss + iBOT's at masked patches + koleo_weight * KoLeo.

    The configuration is the source's short recipe (ViT-L/16 on ImageNet-1k, 125,000 steps). The model's parts are
    settings of the encoder: --encoder.layer-scale 1e-5, --encoder.drop-path .3, --encoder.registers 4.

    The large recipe (625,000 steps of 3,072): targets.centring sinkhorn, shared_head False, 131,072 prototypes in both
    heads, a bottleneck of 384 in `head`, teacher_momentum .994, layer decay 1, lr 2e-4 * sqrt(3), weight decay .04 to
    .2, warm-up 80 / 500, patches of 14 pixels; ViT-g with SwiGLU is --encoder.model vit_giant_patch14_dinov2.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of DINOv2 at the source's values."""

        views: MultiCropConfig = field(default_factory=lambda: dino_views((0.32, 1.0), (0.05, 0.32), 8))
        """Blur as intended: 1 / .1 / .5 (first, second, local). The released models were trained with 0 / .9 / .5,
        since their code passes on the opposite probability."""
        head: HeadConfig = field(default_factory=HeadConfig)
        shared_head: bool = True
        """One head for CLS tokens and patches; otherwise patches have `patch_head`."""
        patch_head: HeadConfig = field(default_factory=HeadConfig)
        targets: TargetConfig = field(default_factory=lambda: TargetConfig(warmup=30 / 100))
        """For views and for patches, each with a centre of its own."""
        student_temperature: float = 0.1
        mask_ratio: tuple[float, float] = (0.1, 0.5)
        """Range of the share of the patches of a masked view that is masked, in blocks."""
        koleo_weight: float = 0.1
        teacher_momentum: float = 0.992
        """How much of its weights the teacher keeps at the first step; 1 at the last, on a half cosine."""
        freeze_last_layer: float = 1 / 100
        """Share of the run in which the prototypes stay as they are."""

    # The source's rate goes with the square root of the batch, 4e-3 at 1024. This is the one for its batch of 2048: for
    # another batch multiply it by sqrt(batch / 2048).
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=4e-3 * (2048 / 1024) ** 0.5,
        lr_base_batch=0,
        weight_decay=0.04,
        final_weight_decay=0.4,
        betas=(0.9, 0.999),
        warmup_fraction=10 / 100,
        min_lr=1e-6,
        layer_decay=0.9,
        clip_norm=3.0,
    )
    shares: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    def __init__(self, config: DINOv2.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        patch_head = config.head if config.shared_head else config.patch_head
        self.heads = nn.ModuleDict({"views": config.head.build(encoder.width)})
        if not config.shared_head:
            self.heads["patches"] = patch_head.build(encoder.width)
        self._patches = "views" if config.shared_head else "patches"
        self.targets = Targets(config.targets, config.head.prototypes)
        self.patch_targets = Targets(config.targets, patch_head.prototypes)
        self.mask_token = mask_token(encoder)
        self.teacher = Teacher(self.students())
        self.frozen = False
        self.floor = torch.zeros(())

    def students(self) -> Mapping[str, nn.Module]:
        """Return what the teacher follows, by name."""
        return {"encoder": self.encoder, **dict(self.heads.items())}

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`; the teacher starts as the student."""
        super().init_weights(at)
        with torch_seeded(at.child("heads")):
            reset(self.heads)
        nn.init.zeros_(self.mask_token)
        self.teacher.copy_from(self.students())

    @property
    def evaluated(self) -> Encoder:
        """The teacher's encoder."""
        return teacher_encoder(self.teacher)

    def prepare(self, crop: Crop, size: int) -> DINOv2Prepare:
        """Return the preparation: DINO's views, and blocks that mask one of the global ones."""
        grid = (size // self.encoder.patch_size,) * 2
        return DINOv2Prepare(multi_crop(self.config.views, self.encoder, size), grid, self.config.mask_ratio)

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return unit vectors of the views and the M masked patches, by student and teacher, and the CLS tokens.

        masked: (M,) how many patches are masked in the view that the patch is from. cls: (B, 2, D), the student's.
        """
        large, mask = global_images(self.encoder, batch), view_masks(batch)
        seen = self.encoder(large, mask=mask, mask_token=self.mask_token[0])
        shared = {
            "student": student_views(self.encoder, self._student("views"), seen, batch),
            "student_patches": self.heads[self._patches](seen.patches[mask]),
            "masked": masked_count(mask),
            "cls": by_sample(summary_token(self.encoder, seen), 2).float(),
        }
        with torch.no_grad():
            encoder = teacher_encoder(self.teacher)
            whole = encoder(large)
            shared["teacher"] = by_sample(self.teacher["views"](summary_token(encoder, whole)), 2)
            shared["teacher_patches"] = self.teacher[self._patches](whole.patches[mask])
        return Outputs(shared=shared)

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shares of the cross-entropies between views and at masked patches, and of KoLeo.

        KoLeo looks for neighbours in the global batch. The source's looks on one GPU only; the result of a run would
        then depend on the number of GPUs.
        """
        temperature = self.config.student_temperature
        with torch.no_grad():
            targets = self.targets(teacher_head(self.teacher, "views").logits(shared["teacher"]))
            patch_targets = self.patch_targets(
                teacher_head(self.teacher, self._patches).logits(shared["teacher_patches"])
            )
        views = view_ce(self._student("views").logits(shared["student"], self.frozen), targets, temperature)
        student = self._student(self._patches).logits(shared["student_patches"], self.frozen)
        patches = masked_ce_sum(student, patch_targets, shared["masked"], temperature)
        patch_floor = per_crop_sum(self.patch_targets.entropies, shared["masked"]) / (2 * len(views))
        self.floor = self.targets.entropies.mean() + patch_floor
        samples = world().size * len(views)
        return {
            "views": views.sum() / samples,
            "patches": patches / (2 * samples),
            "koleo": torch.stack([koleo(cls) for cls in shared["cls"].unbind(dim=1)]).sum(),
        }

    def _student(self, name: str) -> PrototypeHead:
        return cast(PrototypeHead, self.heads[name])

    def weights(self) -> dict[str, float]:
        """Return KoLeo's weight; the others are 1."""
        return {"koleo": self.config.koleo_weight}

    def lr_scales(self) -> dict[str, float]:
        """Return the factor on the learning rate of the patch embedding, on top of the layers' decay."""
        return {"encoder.backbone.patch_embed": 0.2}

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
