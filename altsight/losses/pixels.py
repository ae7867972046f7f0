"""Masked pixel regression (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; specification B1)."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, 3, H, W) into (B, L, patch * patch * 3).

    Patches run row by row; inside a patch the pixels run row by row with the channel last.
    """
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, L, patch * patch * 3) on `grid` (rows, columns) back together: (B, 3, H, W)."""
    b = len(patches)
    rows, columns = grid
    pixels = patches.reshape(b, rows, columns, patch, patch, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (B, L, 1) of each patch: unbiased variance, plus 1e-6 under the root."""
    variance, mean = patches.var(dim=-1, keepdim=True), patches.mean(dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Return patches (B, L, P) with mean 0 and standard deviation 1 each: MAE's `norm_pix` target."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def masked_mse_sum(pred: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Return the squared error, averaged over the pixels of a patch and summed over the masked patches (0-d, fp32).

    Args:
        pred, target: (B, L, P).
        masked: (B, L) bool, True where the encoder did not see the patch.
    """
    error = (pred.float() - target.float()).square().mean(dim=-1)
    return (error * masked).sum()
