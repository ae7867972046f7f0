"""SimMIM: regress the pixels of masked squares from mask tokens in the encoder (Xie et al. 2022; specification B3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.masks import masked_units, unit_mask
from altsight.data.views import Crop, to_unit
from altsight.losses.pixels import patchify, unpatchify
from altsight.methods.base import Corpus, Method
from altsight.methods.mae import inference
from altsight.nn.encoder import Encoder
from altsight.nn.init import truncated


@dataclass(frozen=True)
class SimMIMPrepare:
    """Document -> image: uint8 (3, size, size); mask: (L,) bool, True where the patch is masked, in squares."""

    crop: Crop
    size: int
    grid: tuple[int, int]
    unit: int
    ratio: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        mask = unit_mask(self.grid, self.unit, self.ratio, at)
        return {"image": self.crop(document.images[0], self.size, at), "mask": mask}


class SimMIM(Method):
    """Masked image modelling with a linear head. Images alone; text and labels are not looked at.

    L = mean over the masked pixels and channels of |pixel - predicted|.

    What the source does to the encoder itself is set there: --encoder.positions none --encoder.relative-positions True
    --encoder.layer-scale 0.1 --encoder.init beit --encoder.drop-path 0.1. Its crop keeps at least 0.67 of the image
    (--data.crop.scale 0.67 1).
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SimMIM at the paper's values."""

        mask_unit: int = 32
        """Side of a masked square in pixels."""
        mask_ratio: float = 0.6
        """Share of the squares that is masked, rounded up."""

    # The source scales the first rate of the warm-up by the batch too: here it is that of a batch of 2048, which is
    # [unconfirmed] as the source's.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-4,
        lr_base_batch=512,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup_fraction=10 / 800,
        warmup_lr=5e-7 * 2048 / 512,
        schedule="step",
        step_at=700 / 800,
        clip_norm=5.0,
    )
    masked: ClassVar[bool] = True

    def __init__(self, config: SimMIM.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        _check_units(config, encoder.grid, encoder.patch_size)
        # Not a vector, which would not decay.
        self.mask_token = nn.Parameter(torch.empty(1, encoder.width))
        # A 1 x 1 convolution and a pixel shuffle, as the paper has it, are this map for every patch.
        self.head = nn.Linear(encoder.width, 3 * encoder.patch_size**2)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`: mask token N(0, 0.02), the head as PyTorch does."""
        super().init_weights(at)
        with torch_seeded(at.child("head")):
            truncated(self.mask_token)
            self.head.reset_parameters()

    def prepare(self, crop: Crop, size: int) -> SimMIMPrepare:
        """Return the preparation: one crop and one mask of squares.

        Raises:
            UserError: the squares do not fit this size.
        """
        side, unit = size // self.encoder.patch_size, self.config.mask_unit // self.encoder.patch_size
        _check_units(self.config, (side, side), self.encoder.patch_size)
        return SimMIMPrepare(crop, size, (side, side), unit, self.config.mask_ratio)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches."""
        return {"pixels": batch["mask"].sum()}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode with mask tokens in place of the masked patches, and regress the pixels of these."""
        images, mask = self.encoder.normalize(batch["image"]), batch["mask"]
        target = patchify(images, self.encoder.patch_size)
        return Outputs(local={"pixels": masked_l1_sum(self._predict(images, mask), target, mask)})

    def _predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the pixels of all patches (B, L, patch * patch * 3)."""
        return self.head(self.encoder(images, mask=mask, mask_token=self.mask_token[0]).patches)

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table; the table of relative positions decays, as in the source."""
        names = self.encoder.no_weight_decay()
        return {f"encoder.{name}" for name in names if not name.startswith("relative")}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the images of `batch` with their masked patches as predicted: (B, 3, H, W) fp32 in [0, 1]."""
        with inference(self):
            images = self.encoder.normalize(batch["image"])
            return fill_in(self._predict(images, batch["mask"]), images, batch["mask"], self.encoder)


def masked_l1_sum(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the absolute error, averaged over the pixels of a patch and summed over the masked patches (0-d, fp32).

    Divided by the number of masked patches it is the source's: the sum over masked pixels and channels, by the number
    of masked pixels (plus 1e-5, which guards against none) and by the 3 channels.

    Args:
        pred, target: (B, L, P).
        mask: (B, L) bool, True where the patch is masked.
    """
    return ((pred.float() - target.float()).abs().mean(dim=-1) * mask).sum()


def fill_in(pred: Tensor, images: Tensor, mask: Tensor, encoder: Encoder) -> Tensor:
    """Return normalised `images` with the masked patches from `pred`, in [0, 1]: (B, 3, H, W) fp32.

    Args:
        pred: (B, L, patch * patch * 3), normalised pixels.
        images: (B, 3, H, W), normalised.
        mask: (B, L) bool, True where the patch is masked.
    """
    patches = torch.where(mask.unsqueeze(-1), pred.float(), patchify(images, encoder.patch_size))
    return to_unit(unpatchify(patches, encoder.patch_size, encoder.grid), encoder.config.normalization).clamp(0, 1)


def _check_units(config: SimMIM.Config, grid: tuple[int, int], patch: int) -> None:
    unit = config.mask_unit // patch
    if config.mask_unit % patch or not unit or grid[0] % unit or grid[1] % unit:
        fitting = [n * patch for n in range(1, grid[0] + 1) if grid[0] % n == 0 and grid[1] % n == 0]
        near = min(fitting, key=lambda side: abs(side - config.mask_unit))
        raise UserError(
            f"simmim masks squares of {config.mask_unit} x {config.mask_unit} pixels, which {grid[0]} x {grid[1]} "
            f"patches of {patch} pixels do not make up: set --method.mask-unit {near}."
        )
    units = grid[0] * grid[1] // unit**2
    if not 0 < masked_units(grid, unit, config.mask_ratio) < units:
        raise UserError(
            f"a mask ratio of {config.mask_ratio:g} must leave some of the {units} squares visible and some masked: "
            "change --method.mask-ratio or --method.mask-unit."
        )
