"""Several views of one image: the boxes and colours are drawn by a key, the image is decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.photometric import Photometric, photometric
from altsight.data.views import Crop, crops


@dataclass(frozen=True)
class ViewConfig:
    """How one view is made: its crop, then its colour."""

    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    colour: Photometric = field(default_factory=Photometric)


def draw_views(data: bytes, views: Sequence[tuple[str, ViewConfig, int]], at: Key) -> list[tuple[Tensor, Tensor]]:
    """Return for every (name, config, size) the pixels, uint8 (3, size, size), and the colour, fp32 (11,).

    What is drawn for a view depends on its name, not on the views beside it. A view without a name ("") has the box of
    `config.crop(data, size, at)`: the crop that other methods make at this key.

    Raises:
        BrokenImage: the bytes cannot be decoded.
    """
    keys = [at.child(name) if name else at for name, _, _ in views]
    pixels = crops(data, [(config.crop, size, k) for (_, config, size), k in zip(views, keys, strict=True)])
    return [(p, config.colour.draw(k)) for p, (_, config, _), k in zip(pixels, views, keys, strict=True)]


def stack_views(drawn: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return views of one size as uint8 (V, 3, size, size) and fp32 (V, 11)."""
    return torch.stack([pixels for pixels, _ in drawn]), torch.stack([colour for _, colour in drawn])


def coloured(pixels: Tensor, colours: Tensor) -> Tensor:
    """Return the views (B, V, 3, H, W) uint8 with their colours (B, V, 11) applied: fp32 (V * B, 3, H, W) in [0, 1].

    View by view: the first B rows are the first view of every sample.
    """
    # In fp32 under autocast too: bf16 has no room for 256 values of a colour.
    with torch.autocast(pixels.device.type, enabled=False):
        return photometric(pixels.transpose(0, 1).flatten(0, 1), colours.transpose(0, 1).flatten(0, 1))


LOCAL = 3 / 7
"""Side of a local view relative to that of a global one: 96 of 224 pixels (DINO)."""


@dataclass(frozen=True)
class MultiCropConfig:
    """Two global views of most of an image, and small local ones of small parts of it (SwAV, DINO)."""

    first: ViewConfig
    second: ViewConfig
    local: ViewConfig
    locals: int = 8
    """Number of local views."""
    local_size: int | None = None
    """Their side in pixels, a multiple of the patch size; None: the one nearest to 3/7 of the global views' side."""

    def side(self, size: int, patch: int) -> int:
        """Return the side of the local views beside global ones of `size` pixels, for patches of `patch` pixels.

        Raises:
            UserError: the configured one is no multiple of the patch size.
        """
        if self.local_size is None:
            return max(1, round(LOCAL * size / patch)) * patch
        if self.local_size < patch or self.local_size % patch:
            raise UserError(
                f"local views of {self.local_size} pixels cannot be cut into patches of {patch}: set "
                "--method.views.local-size to a multiple of it, or to None."
            )
        return self.local_size


def dino_views(large: tuple[float, float], small: tuple[float, float], count: int) -> MultiCropConfig:
    """Return DINO's views with `count` local ones: colours and blur as in specification B8.

    large, small: range of the share of the image's area that a global and a local view keeps.
    """

    def view(scale: tuple[float, float], blur: float, solarize: float = 0.0) -> ViewConfig:
        return ViewConfig(Crop(scale=scale), Photometric(saturation=0.2, blur=blur, solarize=solarize))

    return MultiCropConfig(view(large, 1.0), view(large, 0.1, 0.2), view(small, 0.5), count)


@dataclass(frozen=True)
class MultiCropPrepare:
    """Document -> image: uint8 (2, 3, size, size) and colour: fp32 (2, 11), the global views; with local views also
    local: uint8 (V, 3, local_size, local_size) and local_colour: fp32 (V, 11). None without an image.
    """

    views: MultiCropConfig
    size: int
    local_size: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        large = [("first", self.views.first, self.size), ("second", self.views.second, self.size)]
        small = [(f"local {i}", self.views.local, self.local_size) for i in range(self.views.locals)]
        drawn = draw_views(document.images[0], [*large, *small], at)
        image, colour = stack_views(drawn[:2])
        if not small:
            return {"image": image, "colour": colour}
        local, local_colour = stack_views(drawn[2:])
        return {"image": image, "colour": colour, "local": local, "local_colour": local_colour}
