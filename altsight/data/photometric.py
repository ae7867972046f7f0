"""Colour and blur of a view: drawn per sample by a key in the worker, applied to a whole batch on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.rng import Key

_GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R 601-2, as in torchvision)."""
_ORDER, _HUE, _GREYED, _SIGMA, _SOLARIZED = slice(4, 8), 3, 8, 9, 10


@dataclass(frozen=True)
class Photometric:
    """Colour jitter, grey, blur and solarisation, in this order, each with a probability of its own.

    brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x]; hue: a shift from [-x, x] of the circle;
    the four come in random order (torchvision's ColorJitter). sigma: range of the Gaussian blur, in pixels.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    """Probability of the colour jitter."""
    grey: float = 0.2
    """Probability that the view is grey."""
    blur: float = 0.5
    """Probability of the blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    """Probability that all values of at least one half are inverted."""

    def draw(self, at: Key) -> Tensor:
        """Return what is done to one view, fp32 (11,): the parameters that `photometric` applies.

        Where the jitter does not happen the factors are 1 and the shift is 0, and sigma is 0 without a blur.
        """
        generator = at.child("colour").generator()
        coins = generator.random(4) < (self.jitter, self.grey, self.blur, self.solarize)
        spread = (self.brightness, self.contrast, self.saturation, self.hue)
        drawn = [float(generator.uniform(-x, x)) if coins[0] else 0.0 for x in spread]
        factors = [max(0.0, 1 + x) for x in drawn[:3]]
        sigma = float(generator.uniform(*self.sigma)) if coins[2] else 0.0
        order = generator.permutation(4).tolist()
        return torch.tensor([*factors, drawn[3], *order, float(coins[1]), sigma, float(coins[3])])


def photometric(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply to every image what was drawn for it.

    Args:
        images: uint8 (B, 3, H, W).
        parameters: fp32 (B, 11), rows of `Photometric.draw`.

    Returns:
        fp32 (B, 3, H, W) in [0, 1].
    """
    x = images.float() / 255
    for place in range(4):
        for operation in range(4):
            rows = parameters[:, _ORDER][:, place] == operation
            x = _jitter(x, parameters, rows, operation)
    grey = parameters[:, _GREYED].bool().view(-1, 1, 1, 1)
    x = torch.where(grey, _luma(x), x)
    x = _blur(x, parameters[:, _SIGMA])
    inverted = parameters[:, _SOLARIZED].bool().view(-1, 1, 1, 1) & (x >= 128 / 255)
    return torch.where(inverted, 1 - x, x)


def _jitter(x: Tensor, parameters: Tensor, rows: Tensor, operation: int) -> Tensor:
    """Apply brightness (0), contrast (1), saturation (2) or hue (3) to `rows`, if it does anything to them."""
    neutral = 0.0 if operation == _HUE else 1.0
    rows = rows & (parameters[:, operation] != neutral)
    if not bool(rows.any()):
        return x
    part, factor = x[rows], parameters[rows, operation].view(-1, 1, 1, 1)
    if operation == _HUE:
        part = _shift_hue(part, factor)
    else:
        other = (
            torch.zeros_like(part),
            _luma(part).mean(dim=(-3, -2, -1), keepdim=True),
            _luma(part),
        )[operation]
        part = (factor * part + (1 - factor) * other).clamp(0, 1)
    return x.index_put((rows.nonzero().squeeze(1),), part)


def _luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor(_GREY).view(3, 1, 1)).sum(dim=-3, keepdim=True)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (B, 3, H, W) in [0, 1] by `shift` (B, 1, 1, 1) of the circle."""
    value, smallest = x.amax(dim=1), x.amin(dim=1)
    chroma = value - smallest
    safe = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = x.unbind(dim=1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = torch.where(chroma > 0, sector / 6, 0.0) + shift.squeeze(1)
    # value - chroma * max(0, min(k, 4 - k, 1)) with k = (n + 6 hue) mod 6, for n = 5, 3, 1 (red, green, blue).
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur every image with its own Gaussian, cut off at three of its sigmas; borders are reflected."""
    rows = sigma > 0
    if not bool(rows.any()):
        return x
    part = x[rows]
    radius = min(math.ceil(3 * float(sigma.max())), min(x.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[rows].unsqueeze(1)) ** 2)
    # Each at three of its own sigmas, so that an image does not depend on the others in the batch.
    weights = weights * (offsets.abs() <= (3 * sigma[rows]).ceil().unsqueeze(1))
    weights = weights / weights.sum(dim=1, keepdim=True)
    part = F.pad(part, (radius,) * 4, mode="reflect")
    part = _weighted_shifts(_weighted_shifts(part, weights, -1), weights, -2)
    return x.index_put((rows.nonzero().squeeze(1),), part)


def _weighted_shifts(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Convolve every image along an axis with its own weights (n, taps); the axis gets shorter by taps - 1.

    As a sum of shifted images: a convolution would count among the compute of the model.
    """
    taps = weights.shape[1]
    size = x.shape[axis] - taps + 1
    out = torch.zeros_like(x.narrow(axis, 0, size))
    for shift in range(taps):
        out.addcmul_(weights[:, shift, None, None, None], x.narrow(axis, shift, size))
    return out
