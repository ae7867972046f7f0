"""Altsight learns to see from the web's alt text.

The public Python interface is `altsight.api`; its names are importable from here and loaded on first use, so that
`import altsight` and `altsight --help` stay fast.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altsight.api import (
        Run,
        View,
        evaluate,
        export,
        load,
        mix,
        override,
        prepare,
        pretrain,
        recipe,
        sample_tasks,
        study,
        transfer,
    )

__version__ = "0.1.0"
__all__ = [
    "Run",
    "View",
    "evaluate",
    "export",
    "load",
    "mix",
    "override",
    "prepare",
    "pretrain",
    "recipe",
    "sample_tasks",
    "study",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("altsight.api"), name)
    raise AttributeError(f"module 'altsight' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `study` and `transfer` functions: an import of the folders of these names would put modules there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
