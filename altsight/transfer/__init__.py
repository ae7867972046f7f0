"""Transfers of a pre-trained encoder to tasks: found by name in `TRANSFERS`, imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from altsight.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from altsight.transfer.base import Transfer

TRANSFERS = {
    "finetune": ("finetune:Finetune", "train the whole encoder on labelled images (one class each, or several)"),
    "linear_probe": ("linear_probe:LinearProbe", "a linear classifier on frozen features, by LARS (MAE, MoCo v3)"),
    "attentive_probe": ("attentive_probe:AttentiveProbe", "attention pooling and a classifier on frozen tokens (LCL)"),
    "segment": ("segment:Segment", "semantic segmentation with UperNet, or by a linear layer on frozen features"),
    "denseclip": ("denseclip:DenseCLIP", "semantic segmentation led by class names"),
    "detect": ("detect:Detect", "boxes and instance masks, with Mask R-CNN on a simple feature pyramid"),
    "caption": ("caption:Caption", "write captions: a prefix for a language model, or VisualGPT's decoder"),
    "video": ("video:Video", "classify videos, from class names or at random (Text4Vis)"),
    "slides": ("slides:Slides", "classify gigapixel images by class names, without training (MI-Zero)"),
    "selftrain": ("selftrain:SelfTrain", "improve a zero-shot classifier on images without labels (MUST)"),
}
"""Name -> "module:Class" in this package, and what it does."""


def find(name: str) -> type[Transfer]:
    """Return the settings of the transfer `name`: a frozen dataclass that is called with (view, out).

    Raises:
        UserError: there is no such transfer.
    """
    if name not in TRANSFERS:
        raise UserError(f"there is no transfer '{name}'.{did_you_mean(name, TRANSFERS)}")
    module, _, cls = TRANSFERS[name][0].partition(":")
    found: type[Transfer] = getattr(import_module(f"altsight.transfer.{module}"), cls)
    return found
