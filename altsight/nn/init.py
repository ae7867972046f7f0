"""How weights start: the vision transformer's initialisations, fixed positions, and a reset of every module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

VitInit = Literal["mae", "timm", "beit", "moco"]

normal = functools.partial(nn.init.normal_, std=0.02)
truncated = functools.partial(nn.init.trunc_normal_, std=0.02)
cut_at_std = functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)
"""BEiT's: all that lies further than one deviation out is drawn again, which leaves a deviation of 0.0108."""


def fill(
    module: nn.Module,
    draw: Callable[[Tensor], object],
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
) -> None:
    """Fill the weights of all linear maps in `module` (or of `kinds`) by `draw`, in order; biases are 0."""
    for child in module.modules():
        if isinstance(child, kinds):
            draw(child.get_parameter("weight"))
            if getattr(child, "bias", None) is not None:
                nn.init.zeros_(child.get_parameter("bias"))


def init_vit(vit: Any, kind: VitInit) -> None:
    """Set the weights of timm's VisionTransformer `vit`, whose modules are reset already, from torch's generator."""
    if kind in ("mae", "moco"):
        _init_mae(vit, separate_qkv=kind == "moco")
    if kind == "beit":
        _init_beit(vit)


def _init_mae(vit: Any, separate_qkv: bool) -> None:
    fill(vit, nn.init.xavier_uniform_)
    if separate_qkv:
        for block in vit.blocks:
            for part in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
    projection = vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    for token in _tokens(vit):
        nn.init.normal_(token, std=1e-6 if separate_qkv else 0.02)


def _init_beit(vit: Any) -> None:
    fill(vit, cut_at_std, (nn.Linear, nn.Conv2d))
    with torch.no_grad():
        for layer, block in enumerate(vit.blocks, start=1):
            block.attn.proj.weight.div_((2 * layer) ** 0.5)
            block.mlp.fc2.weight.div_((2 * layer) ** 0.5)
    for token in _tokens(vit):
        cut_at_std(token)


def init_clip_blocks(blocks: nn.ModuleList, width: int) -> None:
    """Set the maps of timm's text `blocks`, reset already, with CLIP's standard deviations (specification A1)."""
    residual = width**-0.5 * (2 * len(blocks)) ** -0.5
    stds = {
        "attn.qkv.weight": width**-0.5,
        "attn.proj.weight": residual,
        "mlp.fc1.weight": (2 * width) ** -0.5,
        "mlp.fc2.weight": residual,
    }
    for block in blocks:
        for name, std in stds.items():
            nn.init.normal_(block.get_parameter(name), std=std)
        for name in ("attn.qkv.bias", "attn.proj.bias"):
            nn.init.zeros_(block.get_parameter(name))


def _tokens(vit: Any) -> list[nn.Parameter]:
    return [token for token in (vit.cls_token, vit.reg_token) if token is not None]


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed position table (H * W, width) of MAE: half of the channels for the column, half for the row.

    Each half holds sines then cosines of position / 10000^(i / (width / 4)).
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    rate = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    parts = []
    for coordinate in (columns, rows):
        angle = coordinate.reshape(-1, 1) * rate
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


def reset(module: nn.Module) -> None:
    """Call `reset_parameters` on every submodule that has it, so that no memory is left as it was allocated."""
    for child in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(child, name):
                getattr(child, name)()
                break
