"""Weights under two names: a table from a module's own names to another library's, used in both directions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError

Names = dict[str, str]
"""Own name -> the other library's name."""


def block_names(own: str, other: str, depth: int, parts: Mapping[str, str]) -> Names:
    """Return the names of `depth` blocks: `own`.0.PART -> `other`.0.PART with the names of `parts`.

    A part that ends in "." names a module with weight and bias.
    """
    return {
        f"{own}.{i}.{mine}{kind}": f"{other}.{i}.{theirs}{kind}"
        for i in range(depth)
        for mine, theirs in parts.items()
        for kind in (("weight", "bias") if mine.endswith(".") else ("",))
    }


def linear(own: str, other: str, bias: bool = True) -> Names:
    """Return the names of a module with a weight and, unless told otherwise, a bias."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{own}.{kind}": f"{other}.{kind}" for kind in kinds}


def ratio_of(inner: int, width: int) -> float:
    """Return the ratio from which libraries compute `inner` features, rounding `width` times the ratio down."""
    return inner / width if inner % width == 0 else (inner + 0.5) / width


def adopt(
    model: nn.Module, weights: Mapping[str, Tensor], names: Names, transposed: Collection[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fill the parameters of `model` that `names` lists from `weights`, in fp32.

    Args:
        transposed: own names of matrices that the other library holds the other way round.

    Returns:
        (names in `weights` that were not used, sorted; own names that `weights` lacks).

    Raises:
        UserError: a tensor has another size.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for mine, theirs in names.items():
        if theirs in weights:
            value = weights[theirs].T if mine in transposed else weights[theirs]
            if value.numel() != own[mine].numel():
                raise UserError(
                    f"the weights do not fit what they were recognised as: '{theirs}' is {tuple(value.shape)} there, "
                    f"and {tuple(own[mine].shape)} here; name the model they are of."
                )
            with torch.no_grad():
                own[mine].copy_(value.reshape(own[mine].shape))
    left = tuple(sorted(set(weights) - set(names.values())))
    return left, tuple(mine for mine, theirs in names.items() if theirs not in weights)


def handed_out(model: nn.Module, names: Names, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """Return copies of the weights of `model` that `names` lists, under the other library's names, on the CPU, fp32."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        theirs: (own[mine].T if mine in transposed else own[mine]).detach().cpu().float().clone().contiguous()
        for mine, theirs in names.items()
    }


def need_all(missing: Iterable[str], names: Names, given: str) -> None:
    """Raise UserError if a weight is missing from the weights at `given`."""
    lacking = [names[mine] for mine in missing]
    if lacking:
        raise UserError(
            f"the weights in '{given}' lack {len(lacking)} tensors of what they were recognised as ('{lacking[0]}' is "
            "one): give the whole file."
        )
