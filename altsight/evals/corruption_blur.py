"""The four blurs of ImageNet-C; see `altsight.evals.corruptions`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import ndimage, signal

Unit = npt.NDArray[np.float64]


def defocus_blur(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Convolve with a disk whose edge is softened."""
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    reach = max(8, radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    disk = ndimage.gaussian_filter(disk / disk.sum(), softness, radius=1 if radius <= 8 else 2, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return np.asarray(signal.fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1)))


def glass_blur(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Blur, exchange pixels with near ones, one after the other, and blur again."""
    sigma, far, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    height, width = x.shape[:2]
    blurred = _gaussian(x, sigma)
    places = list(range(height * width))
    rows, columns = range(height - far - 1, far, -1), range(width - far - 1, far, -1)
    for _ in range(rounds):
        shifts = draw.integers(-far, far, size=(len(rows) * len(columns), 2))
        steps = iter((shifts[:, 0] * width + shifts[:, 1]).tolist())
        for row in rows:
            for place in range(row * width + columns.start, row * width + columns.stop, -1):
                other = place + next(steps)
                places[place], places[other] = places[other], places[place]
    return _gaussian(blurred.reshape(-1, x.shape[2])[places].reshape(x.shape), sigma)


def motion_blur(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Smear along a line whose angle is drawn from -45 to 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return smear(x, radius, sigma, draw.uniform(-45, 45))


def zoom_blur(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Average over zooms into the centre."""
    most, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    zooms = np.arange(1, most, step)
    return np.asarray((x + sum(zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1))


def smear(x: Unit, radius: int, sigma: float, angle: float) -> Unit:
    """Return the mean of `x` (H, W, C) and its shifts along a line to one side, weighted by half a Gaussian.

    radius: longest shift in pixels is twice this. angle: in degrees. Edges are repeated.
    """
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    pad = 2 * radius
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    found = np.zeros_like(x)
    for step, weight in enumerate(weights):
        top, left = pad - round(step * down), pad - round(step * right)
        found += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    return found


def zoomed(x: Unit, zoom: float) -> Unit:
    """Return the centre of `x` (H, W, C), enlarged `zoom` times (linearly) to its size."""
    height, width = x.shape[:2]
    inner = [math.ceil(side / zoom) for side in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    large = ndimage.zoom(x[top : top + inner[0], left : left + inner[1]], (zoom, zoom, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    cut = large[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    # Rounding may leave the enlarged centre a pixel short.
    return np.pad(cut, ((0, height - cut.shape[0]), (0, width - cut.shape[1]), (0, 0)), mode="edge")


def _gaussian(x: Unit, sigma: float) -> Unit:
    return np.asarray(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest"))
