"""The four kinds of weather of ImageNet-C; see `altsight.evals.corruptions`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from altsight.evals.corruption_blur import smear, zoomed

Unit = npt.NDArray[np.float64]
GREY = np.array([0.299, 0.587, 0.114])


def snow(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Lay streaks of white over a whitened image."""
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = zoomed(draw.normal(mean, spread, size=x.shape[:2])[..., None], zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = smear(flakes, radius, sigma, draw.uniform(-135, -45))
    grey = (x @ GREY)[..., None]
    whitened = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return np.asarray(whitened + flakes + np.rot90(flakes, 2))


def frost(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Lay crystals over the image.

    The source lays photographs of frosted windows over it. The texture here is made up: bright ridges of two fractals,
    bluish white, about as bright on the mean as such photographs; the weights are the source's.
    """
    of_image, of_frost = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    ridges = [1 - abs(2 * plasma(x.shape[0], x.shape[1], decay, draw) - 1) for decay in (1.4, 1.2)]
    crystals = (ridges[0] ** 2 + ridges[1] ** 4) / 2
    return np.asarray(of_image * x + of_frost * crystals[..., None] * np.array([0.9, 0.97, 1.0]))


def fog(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Add a fractal cloud, and darken the whole so that the brightest value stays."""
    strength, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    cloud = plasma(x.shape[0], x.shape[1], decay, draw)[..., None]
    return np.asarray((x + strength * cloud) * x.max() / (x.max() + strength))


def brightness(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Raise the value of every pixel (the V of HSV), at its hue and saturation."""
    value = x.max(axis=2, keepdims=True)
    raised = np.clip(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 0, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised)


def plasma(height: int, width: int, decay: float, draw: np.random.Generator) -> Unit:
    """Return a fractal (height, width) in [0, 1] by midpoint displacement (diamond and square steps), on a torus.

    decay: the displacement falls by its square from one scale to the next, half as large.
    """
    size = 1 << (max(height, width) - 1).bit_length()
    found, step, wobble = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half = step // 2
        corners = found[::step, ::step]
        around = corners + np.roll(corners, -1, axis=0)
        around = around + np.roll(around, -1, axis=1)
        found[half::step, half::step] = around / 4 + wobble * draw.uniform(-wobble, wobble, corners.shape)
        middles = found[half::step, half::step]
        beside = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        found[::step, half::step] = beside / 4 + wobble * draw.uniform(-wobble, wobble, corners.shape)
        found[half::step, ::step] = above / 4 + wobble * draw.uniform(-wobble, wobble, corners.shape)
        step, wobble = half, wobble / decay
    found -= found.min()
    return np.asarray(found[:height, :width] / found.max())
