"""A picture of where the tiles of a slide resemble a class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
from torch import Tensor

from altsight.data.slide import Slide, thumbnail
from altsight.data.tiles import Coords

SIDE = 512
"""Longer side of one panel, in pixels."""
BAR = 22
"""Height of the line of text above a panel."""
COLOURS = np.array([(43, 60, 160), (60, 160, 190), (245, 225, 120), (215, 40, 40)], dtype=np.float64)
"""From the smallest score of a class to its largest."""


def draw_heatmap(slide: Slide, coords: Coords, span: int, scores: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG: the slide, and beside it for each class the slide under the scores of its tiles.

    Args:
        coords: (left, top) of the tiles in pixels of level 0 (N, 2).
        span: their side there.
        scores: class -> (N,); the colours span the range of each class, which is written above it.
    """
    small = thumbnail(slide, SIDE)
    panels = [_panel("", small)]
    for name, values in scores.items():
        low, high = float(values.min()), float(values.max())
        shade = _field(small.shape[:2], slide.size, coords, span, (values.numpy() - low) / max(high - low, 1e-12))
        known = ~np.isnan(shade)[..., None]
        tint = np.where(known, ramp(np.nan_to_num(shade)), small)
        # What resembles the class most is covered most.
        weight = np.where(known, 0.1 + 0.6 * np.nan_to_num(shade)[..., None], 0)
        panels.append(_panel(f"{name}: {low:.3f} ... {high:.3f}", small * (1 - weight) + tint * weight))
    width, height = panels[0].size
    sheet = PIL.Image.new("RGB", (len(panels) * (width + 8) - 8, height), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * (width + 8), 0))
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(part, format="PNG")
    part.replace(path)


def ramp(shade: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the colours (..., 3), 0 to 255, of values in [0, 1]."""
    at = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(shade, at, COLOURS[:, channel]) for channel in range(3)], axis=-1)


def _field(
    shape: tuple[int, ...], size: tuple[int, int], coords: Coords, span: int, values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the value of the tile at every pixel of the thumbnail (H, W); the largest where several are, NaN where
    there is none.
    """
    field = np.full(shape, np.nan)
    across, down = shape[1] / size[0], shape[0] / size[1]
    for (left, top), value in zip(coords, values, strict=True):
        rows = slice(int(top * down), max(int(np.ceil((top + span) * down)), int(top * down) + 1))
        columns = slice(int(left * across), max(int(np.ceil((left + span) * across)), int(left * across) + 1))
        field[rows, columns] = np.fmax(field[rows, columns], value)
    return field


def _panel(title: str, pixels: npt.NDArray[np.generic]) -> PIL.Image.Image:
    picture = PIL.Image.fromarray(np.clip(pixels.astype(np.float64), 0, 255).astype(np.uint8))
    panel = PIL.Image.new("RGB", (picture.width, picture.height + BAR), "white")
    panel.paste(picture, (0, BAR))
    PIL.ImageDraw.Draw(panel).text((4, 4), title, fill="black")
    return panel
