"""Accelerators for any method: a curriculum of input sizes (EfficientTrain and others), and patch dropout.

Stages fall on whole global batches, and which one a step is in depends on its number alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from altsight.core.errors import UserError
from altsight.data.loader import Prepare
from altsight.data.staged import PatchDropout, Shrink, Staged, stage_crop, with_own_crops
from altsight.data.views import Crop
from altsight.methods.base import Method
from altsight.nn.encoder import Encoder

Name = Literal["none", "efficienttrain", "efficienttrain++", "efficienttrain++_deit", "progressive"]


@dataclass(frozen=True)
class AccelerateConfig:
    """Ways to train any method at less cost. They change what is learned from, so arms of a study should share them."""

    curriculum: Name = "none"
    """Small inputs first: EfficientTrain (1.5 times fewer FLOPs per sample for convolutional nets), EfficientTrain++
    (2.3 times), its variant for DeiT, or plain progressive resizing. Samples are counted as ever, so a run of as many
    samples costs less."""
    shrink: Literal["source", "low_frequency", "resize"] = "source"
    """How inputs become smaller: low_frequency crops their spectrum on the device (EfficientTrain), resize does it in
    the loader (EfficientTrain++ as released, progressive); source: as the curriculum's source does."""
    augment: bool = True
    """Raise RandAugment's magnitude from stage to stage, as in EfficientTrain; acts on the crop that methods share."""
    patch_dropout: float = 0.0
    """Share of the patches that is left out of every image, drawn anew for each (FLIP: 0.5)."""


@dataclass(frozen=True)
class Table:
    """A published curriculum: (input side as a share of the full one, RandAugment magnitude) of its stages.

    Stages are equal parts of the samples, or, where `by_compute`, of the compute; the learning rate follows the same.
    """

    stages: tuple[tuple[float, int | None], ...]
    by_compute: bool
    shrink: Shrink


def _of_224(sides: Sequence[int], magnitudes: Sequence[int]) -> tuple[tuple[float, int], ...]:
    return tuple((side / 224, magnitude) for side, magnitude in zip(sides, magnitudes, strict=True))


_SMALL_HALF = (96, 96, 160, 160, 160, 160)
TABLES: dict[str, Table] = {
    "none": Table(((1.0, None),), False, "low_frequency"),
    # Specification 3.3, which holds what the authors released.
    "efficienttrain": Table(_of_224((160, 160, 160, 192, 224), (1, 3, 5, 7, 9)), False, "low_frequency"),
    "efficienttrain++": Table(_of_224((*_SMALL_HALF, 224, 224, 224, 224), range(10)), True, "resize"),
    "efficienttrain++_deit": Table(_of_224((*_SMALL_HALF, 192, 192, 224, 224), range(10)), True, "resize"),
    # Four stages from half of the side, linear, as EfficientNetV2 has it (Tan and Le 2021, from 128 to 300 pixels);
    # its growing dropout and mixup are parts of its recipe for classification.
    "progressive": Table(((1 / 2, None), (2 / 3, None), (5 / 6, None), (1.0, None)), False, "resize"),
}


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop` (excluded) of a run. size: side of the input in pixels. magnitude: RandAugment's."""

    start: int
    stop: int
    size: int
    magnitude: int | None = None


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run of `batch` samples a step on an encoder with inputs of side `full`."""

    stages: tuple[Stage, ...]
    full: int
    batch: int
    by_compute: bool = False
    shrink: Shrink = "low_frequency"
    patch_dropout: float = 0.0

    def stage(self, step: int) -> Stage:
        """Return the stage that `step` is in; the last one from its start on."""
        return next((stage for stage in self.stages if step < stage.stop), self.stages[-1])

    def compute(self, step: int) -> float:
        """Return what the steps before `step` cost, in steps at full size; cost goes with the area of the input."""
        return sum(
            (min(max(step, stage.start), stage.stop) - stage.start) * (stage.size / self.full) ** 2
            for stage in self.stages
        )

    @property
    def relative_compute(self) -> float:
        """What the run costs, relative to one of as many samples at full size (EfficientTrain's 0.653)."""
        return self.compute(self.stages[-1].stop) / self.stages[-1].stop

    def progress(self, step: int) -> float:
        """Return the step that the learning rate is to be that of: `step`, or the share of the compute in steps."""
        return self.compute(step) / self.relative_compute if self.by_compute else step

    def prepare(self, method: Method, crop: Crop) -> Prepare:
        """Return the preparation of every sample of the run: the method's own, at the size of the sample's stage."""
        starts = tuple(stage.start * self.batch for stage in self.stages)
        prepares = tuple(self.prepare_in(stage, method, crop) for stage in self.stages)
        return prepares[0] if len(prepares) == 1 else Staged(starts, prepares)

    def prepare_in(self, stage: Stage, method: Method, crop: Crop) -> Prepare:
        """Return the preparation of the samples of one stage."""
        if stage.size < self.full or stage.magnitude is not None:
            crop = stage_crop(crop, self.full, stage.size, self.shrink, stage.magnitude)
        prepare = method.prepare(crop, stage.size)
        if stage.size < self.full and self.shrink == "low_frequency":
            prepare = with_own_crops(prepare, self.full, stage.size)
        if self.patch_dropout:
            prepare = PatchDropout(prepare, method.encoder.patches_at(stage.size), self.patch_dropout)
        return prepare


def make_curriculum(config: AccelerateConfig, method: Method, name: str, steps: int, batch: int) -> Curriculum:
    """Return the curriculum of a run of the method called `name`.

    Raises:
        UserError: the encoder cannot take a size of the curriculum, or patches are to be dropped and cannot be.
    """
    encoder = method.encoder
    table, full = TABLES[config.curriculum], encoder.config.img_size
    sizes = [_size(share, encoder) for share, _ in table.stages]
    _check_dropout(config.patch_dropout, method, name, encoder.patches_at(min(sizes)))
    _check_sizes(encoder, sorted({size for size in sizes if size != full}))
    lengths = [(full / size) ** 2 if table.by_compute else 1.0 for size in sizes]
    ends = [round(steps * sum(lengths[: number + 1]) / sum(lengths)) for number in range(len(sizes))]
    stages = [
        Stage(start, stop, size, magnitude if config.augment else None)
        for start, stop, size, (_, magnitude) in zip([0, *ends], ends, sizes, table.stages, strict=False)
    ]
    return Curriculum(
        # A run of few steps has no room for all of them.
        tuple(stage for stage in stages if stage.start < stage.stop),
        full,
        batch,
        table.by_compute,
        table.shrink if config.shrink == "source" else config.shrink,
        config.patch_dropout,
    )


def _size(share: float, encoder: Encoder) -> int:
    """Return the even multiple of the patch size that is nearest to `share` of the encoder's full input."""
    full = encoder.config.img_size
    unit = math.lcm(2, encoder.patch_size or 1)
    return full if share == 1 else min(full, max(1, round(share * full / unit)) * unit)


@torch.no_grad()
def _check_sizes(encoder: Encoder, sizes: Sequence[int]) -> None:
    """Let the encoder see one blank image of every size."""
    training = encoder.training
    encoder.eval()
    try:
        for size in sizes:
            encoder(torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["it does not say why"])[0]
        raise UserError(
            f"'{encoder.config.model}' cannot take the images of {size} x {size} pixels of this curriculum ({reason}): "
            "set --accelerate.curriculum none, or use a plain ViT or a convolutional net."
        ) from None
    finally:
        encoder.train(training)


def _check_dropout(ratio: float, method: Method, name: str, patches: int) -> None:
    """Raise UserError if `method` cannot leave out the share `ratio` of as few as `patches` patches."""
    if not ratio:
        return
    off = "leave --accelerate.patch-dropout at 0"
    if not 0 < ratio < 1 or not int(patches * (1 - ratio)):
        raise UserError(f"a patch dropout of {ratio:g} must leave some of {patches} patches: use a share of 0 to 0.75.")
    if not method.encoder.is_vit:
        raise UserError(f"'{method.encoder.config.model}' has no patches that can be left out: {off}, or use a ViT.")
    if method.masked:
        raise UserError(f"{name} hides patches itself: {off}.")
    if not method.drops_patches:
        raise UserError(f"{name} cannot drop patches: {off}.")


def set_input_size(method: Method, size: int) -> None:
    """Set the side of the input of the method's encoder and of the copies that it keeps of it (teachers)."""
    for module in method.modules():
        if isinstance(module, Encoder):
            module.input_size = size


@contextmanager
def full_size(method: Method) -> Iterator[None]:
    """Run the body (an evaluation) with inputs at full size, then put the stage's size back."""
    before = method.encoder.input_size
    set_input_size(method, method.encoder.config.img_size)
    try:
        yield
    finally:
        set_input_size(method, before)
