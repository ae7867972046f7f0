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
    "supervised": "altsight.methods.supervised:Supervised",
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
