"""Several views of one image: the boxes and colours are drawn by a key, the image is decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altsight.core.rng import Key
from altsight.data.photometric import Photometric, photometric
from altsight.data.views import Crop, crops


@dataclass(frozen=True)
class ViewConfig:
    """How one view is made: its crop, then its colour."""

    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    colour: Photometric = field(default_factory=Photometric)


def draw_views(data: bytes, views: Sequence[tuple[str, ViewConfig, int]], at: Key) -> list[tuple[Tensor, Tensor]]:
    """Return for every (name, config, size) the pixels, uint8 (3, size, size), and the colour, fp32 (11,).

    What is drawn for a view depends on its name, not on the views beside it.

    Raises:
        BrokenImage: the bytes cannot be decoded.
    """
    keys = [at.child(name) for name, _, _ in views]
    pixels = crops(data, [(config.crop, size, k) for (_, config, size), k in zip(views, keys, strict=True)])
    return [(p, config.colour.draw(k)) for p, (_, config, _), k in zip(pixels, views, keys, strict=True)]


def stack_views(drawn: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return views of one size as uint8 (V, 3, size, size) and fp32 (V, 11)."""
    return torch.stack([pixels for pixels, _ in drawn]), torch.stack([colour for _, colour in drawn])


def coloured(pixels: Tensor, colours: Tensor) -> Tensor:
    """Return the views (B, V, 3, H, W) uint8 with their colours (B, V, 11) applied: fp32 (V * B, 3, H, W) in [0, 1].

    View by view: the first B rows are the first view of every sample.
    """
    return photometric(pixels.transpose(0, 1).flatten(0, 1), colours.transpose(0, 1).flatten(0, 1))
