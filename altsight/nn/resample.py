"""An encoder at another input size: its weights copied, position tables and patch embedding resampled to fit."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from altsight.core.errors import UserError
from altsight.nn.backbone import has_fixed_size
from altsight.nn.encoder import Encoder

POSITIONS = "backbone.pos_embed"
PATCHES = "backbone.patch_embed.proj.weight"
WINDOWS = ("relative_position_index", "attn_mask")


def resized(encoder: Encoder, **changes: Any) -> Encoder:
    """Return a copy of `encoder` with `changes` to its config (img_size, patch_size, drop_path).

    Position tables are resampled bicubically, as in MAE's and BEiT's fine-tuning (specification D5), and patch
    embeddings by the pseudo-inverse of the resize (FlexiViT, Beyer et al. 2023). The encoder itself is left alone.

    Raises:
        UserError: the sizes do not fit, the drop path is no share, or its relative positions are asked to take another
            size.
    """
    config = replace(encoder.config, **changes)
    if not 0 <= config.drop_path < 1:
        raise UserError(f"a drop path of {config.drop_path:g} is no share of branches to drop: use 0 to less than 1.")
    made = Encoder(config)
    state = encoder.state_dict()
    if not encoder.is_vit and has_fixed_size(config.model) and config.img_size != encoder.config.img_size:
        state = _resized_by_timm(state, made)
    if encoder.is_vit and made.grid != encoder.grid:
        if encoder.relative is not None:
            raise UserError(
                f"relative positions hold for images of {encoder.config.img_size} pixels only: leave the size as it is."
            )
        if POSITIONS in state:
            state[POSITIONS] = resample_positions(state[POSITIONS], made.grid, encoder.grid, encoder.prefix)
    if encoder.is_vit and made.patch_size != encoder.patch_size:
        state[PATCHES] = resample_patch_embed(state[PATCHES], [made.patch_size, made.patch_size])
    try:
        made.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"'{config.model}' takes images of one size only: leave the size as it is.") from None
    return made.to(next(encoder.parameters()).device)


def _resized_by_timm(state: dict[str, Tensor], made: Encoder) -> dict[str, Tensor]:
    """Return the state with the tables of relative positions of Swin, BEiT, EVA ... resampled as their files are."""
    convert = getattr(import_module(type(made.backbone).__module__), "checkpoint_filter_fn", lambda state, _: state)
    plain = {name.removeprefix("backbone."): value for name, value in state.items()}
    converted = {f"backbone.{name}": value for name, value in convert(plain, made.backbone).items()}
    # Indices and masks of windows belong to the size, not to the weights.
    return made.state_dict() | {name: value for name, value in converted.items() if not name.endswith(WINDOWS)}


def resample_positions(table: Tensor, grid: tuple[int, int], old: tuple[int, int], prefix: int) -> Tensor:
    """Return a position table (1, prefix + h w, D) for `grid` = (h, w) from one for the grid `old`.

    prefix: tokens before the patches; those that have rows in the table keep them.
    """
    rows = table.shape[1] - old[0] * old[1]
    assert rows in (0, prefix), "a position table has rows for all prefix tokens or for none"
    with torch.no_grad():
        # timm reads old sizes as squares unless it is told.
        return resample_abs_pos_embed(table.float(), list(grid), list(old), num_prefix_tokens=rows).to(table.dtype)
