"""Computing once what several callers ask a module for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Once(nn.Module):
    """A module that, within `once`, answers calls with the very same tensors by what it has computed before."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[Any, ...], tuple[Any, Any]] | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within the body, compute nothing twice; random parts (dropout) are then drawn once too."""
        self._known = {}
        try:
            yield
        finally:
            self._known = None

    def remembered(self, compute: Callable[..., Any], name: str, given: dict[str, Tensor]) -> Any:
        """Return compute(**given), or within `once` what it returned for the same tensors under this `name`."""
        if self._known is None:
            return compute(**given)
        key = (name, torch.is_grad_enabled(), *((argument, id(tensor)) for argument, tensor in given.items()))
        if key not in self._known:
            # The tensors are kept, so that their ids do not pass to others.
            self._known[key] = (compute(**given), given)
        return self._known[key][0]

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Call `forward`, compiled where it was asked for; outside of `once` this is what every module does."""
        if self._known is None:
            return super().__call__(*args, **named)
        given = inspect.signature(self.forward).bind(*args, **named).arguments
        return self.remembered(super().__call__, "forward", {n: t for n, t in given.items() if t is not None})
