"""The fifteen corruptions of ImageNet-C in five severities, as functions (Hendrycks and Dietterich 2019).

Written from the published definitions and constants, which are meant for images whose shorter side is about 224 pixels.
Each is a pure function of (pixels, severity, key). What differs from the source: frost has no photographs but a texture
that is made up; motion blur is a sum of shifted images where the source calls ImageMagick; images need not be square.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import PIL.Image
from scipy import ndimage

from altsight.core.errors import UserError, did_you_mean
from altsight.core.rng import Key
from altsight.evals.changed import Pixels
from altsight.evals.corruption_blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from altsight.evals.corruption_weather import brightness, fog, frost, snow

Unit = npt.NDArray[np.float64]
"""(H, W, 3) in [0, 1]; what comes out of a corruption may lie outside and is clipped."""
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(pixels: Pixels, name: str, severity: int, at: Key) -> Pixels:
    """Return `pixels` (H, W, 3) under the corruption `name` of severity 1 to 5; the same key, the same image.

    Raises:
        UserError: there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"there is no corruption '{name}'.{did_you_mean(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"there is no severity {severity} of '{name}': they are 1 to 5.")
    draw = at.child(f"{name}/{severity}").generator()
    unit = CORRUPTIONS[name](pixels / 255, severity, draw)
    # The source's cast to bytes cuts off what is below a whole number.
    return np.asarray(np.clip(unit, 0, 1) * 255, dtype=np.uint8)


def gaussian_noise(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Add noise to every value."""
    return x + draw.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], size=x.shape)


def shot_noise(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Count few photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return np.asarray(draw.poisson(x * photons) / photons)


def impulse_noise(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Set some values to black or white, each channel by itself."""
    hit = draw.random(x.shape) <= (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    return np.where(hit, (draw.random(x.shape) <= 0.5).astype(np.float64), x)


def contrast(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Move every value towards the mean of its channel."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.asarray((x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean)


def elastic_transform(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Shear the image a little, then move every pixel by a smooth random field."""
    strength, smooth, shear = (
        (2.0, 0.7, 0.1),
        (2.0, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    )[severity - 1]
    height, width = x.shape[:2]
    centre, arm = np.array([height, width]) // 2, min(height, width) // 3
    corners = centre + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + draw.uniform(-shear * SIDE, shear * SIDE, size=corners.shape)
    # Output places are asked where they come from: the inverse of the map from `corners` to `moved`.
    inverse = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T
    matrix, offset = inverse[:, :2], inverse[:, 2]
    field = [
        ndimage.gaussian_filter(draw.uniform(-1, 1, (height, width)), smooth * SIDE, mode="reflect", truncate=3)
        * strength
        * SIDE
        for _ in range(2)
    ]
    places = np.indices((height, width)) + np.stack(field)
    channels = []
    for c in range(3):
        sheared = ndimage.affine_transform(x[..., c], matrix, offset, order=1, mode="mirror")
        channels.append(ndimage.map_coordinates(sheared, places, order=1, mode="reflect"))
    return np.stack(channels, axis=2)


def pixelate(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Average over boxes, and enlarge the boxes again."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    image, (height, width) = _picture(x), x.shape[:2]
    small = image.resize((max(1, int(width * share)), max(1, int(height * share))), PIL.Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), PIL.Image.Resampling.BOX)) / 255


def jpeg_compression(x: Unit, severity: int, draw: np.random.Generator) -> Unit:
    """Save as a JPEG of low quality."""
    buffer = io.BytesIO()
    _picture(x).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(PIL.Image.open(buffer).convert("RGB")) / 255


SIDE = 244
"""The side that the source's constants of the elastic transform are shares of."""
CORRUPTIONS: dict[str, Callable[[Unit, int, np.random.Generator], Unit]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
"""Name -> (pixels in [0, 1], severity, generator) -> pixels; in the source's order."""


def _picture(x: Unit) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.round(x * 255).astype(np.uint8))
