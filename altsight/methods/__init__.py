"""The pre-training methods: one file each, found by name in `METHODS`, imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from altsight.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from altsight.methods.base import Method

METHODS = {
    "mae": "altsight.methods.mae:MAE",
    "clip": "altsight.methods.clip:CLIP",
    "mug": "altsight.methods.mug:MUG",
    "lcl": "altsight.methods.lcl:LCL",
    "supervised": "altsight.methods.supervised:Supervised",
    "simclr": "altsight.methods.simclr:SimCLR",
    "mocov3": "altsight.methods.mocov3:MoCoV3",
    "byol": "altsight.methods.byol:BYOL",
    "simsiam": "altsight.methods.simsiam:SimSiam",
    "dino": "altsight.methods.dino:DINO",
    "ibot": "altsight.methods.ibot:IBOT",
    "dinov2": "altsight.methods.dinov2:DINOv2",
    "slip": "altsight.methods.slip:SLIP",
    "virtex": "altsight.methods.virtex:VirTex",
    "visualgpt": "altsight.methods.visualgpt:VisualGPT",
    "beit": "altsight.methods.beit:BEiT",
    "simmim": "altsight.methods.simmim:SimMIM",
    "splitmask": "altsight.methods.splitmask:SplitMask",
    "m3ae": "altsight.methods.m3ae:M3AE",
    "coca": "altsight.methods.coca:CoCa",
    "align": "altsight.methods.align:ALIGN",
    "siglip": "altsight.methods.siglip:SigLIP",
    "lit": "altsight.methods.lit:LiT",
    "flip": "altsight.methods.flip:FLIP",
    "composite": "altsight.methods.composite:Composite",
}


def find(name: str) -> type["Method"]:
    """Return the class of the method `name`.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'.{did_you_mean(name, METHODS)}")
    module, _, cls = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), cls)
    return found
