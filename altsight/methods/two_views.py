"""Two views of one image: how joint-embedding methods make them, and what their encoder says of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altsight.core.rng import Key
from altsight.core.types import Document, Example
from altsight.data.multicrop import ViewConfig, coloured, draw_views, stack_views
from altsight.data.photometric import Photometric
from altsight.nn.encoder import Encoder, FeaturePoint

BYOL_FIRST = ViewConfig(colour=Photometric(0.4, 0.4, 0.2, 0.1, blur=1.0))
BYOL_SECOND = ViewConfig(colour=Photometric(0.4, 0.4, 0.2, 0.1, blur=0.1, solarize=0.2))
"""The unequal views of BYOL and MoCo v3 (specification B4, B6): one always blurred, the other at times solarised."""


@dataclass(frozen=True)
class TwoViews:
    """Document -> image: uint8 (2, 3, size, size), both views; colour: fp32 (2, 11). None without an image."""

    first: ViewConfig
    second: ViewConfig
    size: int

    @property
    def wanted(self) -> list[tuple[str, ViewConfig, int]]:
        """The views by name, as `draw_views` takes them."""
        return [("first", self.first, self.size), ("second", self.second, self.size)]

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        image, colour = stack_views(draw_views(document.images[0], self.wanted, at))
        return {"image": image, "colour": colour}


def view_images(encoder: Encoder, pixels: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second views, (B, 3, H, W) fp32 each, normalised for `encoder`.

    Args:
        encoder: says how pixels are normalised.
        pixels: uint8 (B, 2, 3, H, W).
        colours: fp32 (B, 2, 11), what is done to the views' colours.
    """
    first, second = encoder.normalize(coloured(pixels, colours)).chunk(2)
    return first, second


def view_features(
    encoder: Encoder, images: tuple[Tensor, Tensor], visible: Tensor | None, point: FeaturePoint
) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) of the first and the second views at `point`.

    One view after the other, as in the sources: batch norm in an encoder then has the statistics of one view.

    Args:
        encoder: the student's or the teacher's.
        images: (B, 3, H, W) each, normalised.
        visible: (B, K) patches that are encoded, where patch dropout is on; the same places in both views.
        point: where features are read.
    """
    first, second = (encoder.point(encoder(view, visible), point) for view in images)
    return first, second
