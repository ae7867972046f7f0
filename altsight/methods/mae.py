"""MAE: regress the pixels of masked patches from the visible ones (He et al. 2022; specification B1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.views import Crop, random_keep, to_unit
from altsight.losses.pixels import masked_mse_sum, normalize_patches, patch_statistics, patchify, unpatchify
from altsight.methods.base import Corpus, Method
from altsight.nn.decoder import PixelDecoder, PixelDecoderConfig
from altsight.nn.encoder import Encoder


@dataclass(frozen=True)
class MAEPrepare:
    """Document -> image: uint8 (3, size, size); keep: (K,) int64, the patches that stay visible."""

    crop: Crop
    size: int
    patches: int
    mask_ratio: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        image = self.crop(document.images[0], self.size, at)
        return {"image": image, "keep": random_keep(self.patches, self.mask_ratio, at)}


class MaskedPixels(nn.Module):
    """The pixel branch: decoder, loss and reconstruction; shared by all methods that regress masked pixels.

    Raises:
        UserError: the mask ratio leaves no patch visible, or none to predict.
    """

    def __init__(self, encoder: Encoder, decoder: PixelDecoderConfig, mask_ratio: float, norm_pix: bool) -> None:
        super().__init__()
        if not 0 < int(encoder.num_patches * (1 - mask_ratio)) < encoder.num_patches:
            raise UserError(
                f"a mask ratio of {mask_ratio:g} must leave some of the {encoder.num_patches} patches visible and some "
                "masked: change --method.mask-ratio."
            )
        self.grid, self.patch_size, self.norm_pix = encoder.grid, encoder.patch_size, norm_pix
        self.normalization = encoder.config.normalization
        self.decoder = PixelDecoder(decoder, encoder)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`."""
        self.decoder.init_weights(at)

    def masked(self, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, L) bool from `keep` (B, K): True where the patch of `grid` is not visible."""
        shape = (len(keep), grid[0] * grid[1])
        return torch.ones(shape, dtype=torch.bool, device=keep.device).scatter(1, keep, False)

    def loss_sum(self, tokens: Tensor, keep: Tensor, images: Tensor) -> Tensor:
        """Return the loss of one micro-batch, summed over its masked patches (0-d, fp32).

        Args:
            tokens: (B, prefix + K, D) from the encoder.
            keep: (B, K).
            images: (B, 3, H, W), normalised: what the encoder was given.
        """
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        target = patchify(images, self.patch_size)
        if self.norm_pix:
            target = normalize_patches(target)
        return masked_mse_sum(self.decoder(tokens, keep, grid), target, self.masked(keep, grid))

    def count(self, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the number of masked patches of images with `grid` (0-d int64)."""
        return keep.new_tensor(len(keep) * (grid[0] * grid[1] - keep.shape[1]))

    def reconstruct(self, tokens: Tensor, keep: Tensor, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) fp32 in [0, 1]: visible patches from `images`, the masked ones as predicted.

        Under `norm_pix` a prediction lacks its patch's mean and contrast; they are taken from the image, as in MAE's
        own figures.
        """
        pixels = patchify(images, self.patch_size)
        pred = self.decoder(tokens, keep).float()
        if self.norm_pix:
            mean, std = patch_statistics(pixels)
            pred = pred * std + mean
        patches = torch.where(self.masked(keep, self.grid).unsqueeze(-1), pred, pixels)
        return to_unit(unpatchify(patches, self.patch_size, self.grid), self.normalization).clamp(0, 1)


class MAE(Method):
    """Masked autoencoder. Images alone; text and labels are not looked at.

    L = mean over the masked patches of the squared error of their (normalised) pixels.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of MAE at the paper's values."""

        mask_ratio: float = 0.75
        norm_pix: bool = True
        """Predict each patch normalised by its own mean and standard deviation."""
        decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-4, lr_base_batch=256, weight_decay=0.05, betas=(0.9, 0.95), warmup_fraction=40 / 800
    )
    masked: ClassVar[bool] = True

    def __init__(self, config: MAE.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.pixels = MaskedPixels(encoder, config.decoder, config.mask_ratio, config.norm_pix)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.pixels.init_weights(at.child("pixels"))

    def prepare(self, crop: Crop, size: int) -> MAEPrepare:
        """Return the preparation: one crop and one random mask."""
        return MAEPrepare(crop, size, self.encoder.patches_at(size), self.config.mask_ratio)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches."""
        return {"pixels": self.pixels.count(batch["keep"], self.encoder.input_grid)}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the visible patches only, decode all, compare the masked ones."""
        images = self.encoder.normalize(batch["image"])
        tokens = self.encoder(images, batch["keep"]).tokens
        return Outputs(local={"pixels": self.pixels.loss_sum(tokens, batch["keep"], images)})

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the images of `batch` with their masked patches as predicted: (B, 3, H, W) fp32 in [0, 1]."""
        with inference(self):
            images = self.encoder.normalize(batch["image"])
            return self.pixels.reconstruct(self.encoder(images, batch["keep"]).tokens, batch["keep"], images)


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Run the body without gradients and in evaluation mode, then put the mode back."""
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(mode)
