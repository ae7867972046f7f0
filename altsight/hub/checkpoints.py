"""Files that the authors of methods published, and bare files of timm's weights, told apart by the names in them.

MAE, MoCo v3, DINO, iBOT, DINOv2, BEiT and DeiT III. A file says what its weights are called, not how its images
were prepared: that is the authors' evaluation, the table in docs/weights.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.base import Preprocess
from altsight.hub.fill import filled, timm_point
from altsight.hub.guess import FAMILIES, Guess, Weights, beit, common, dinov2, heads_of, is_beit, is_vit, plain_vit
from altsight.hub.model import Found, Model
from altsight.hub.source import Source
from altsight.hub.timm import WRAPS

PREFIXES = ("module.base_encoder.", "module.backbone.", "backbone.", "encoder.", *WRAPS, "")
"""What the names of the encoder begin with; the first that fits: MoCo v3 evaluates its base encoder."""


def recognises(source: Source) -> bool:
    """Return whether `source` is a bare file, or a folder with nothing but one."""
    return not (source.scheme or source.json("config.json") or source.json("open_clip_config.json"))


def read(source: Source) -> Model:
    """Return the encoder in the file, with what was found beside it left over.

    Raises:
        UserError: the weights are of no known kind, some are missing, or they cannot be represented.
    """
    prefix, weights = _inside(source.weights)
    beside = {name for name in source.weights if not name.startswith(prefix)}
    guess = _of_vit(prefix, weights, source.content) if is_vit(weights) else _of_timm(weights, source.given)
    encoder, left = filled(guess.config, guess.weights, source.given)
    found = Found(guess.recognised, tuple(sorted({*left, *beside})))
    size = guess.config.img_size
    preprocess = Preprocess(size, guess.config.normalization, crop_ratio=1.0 if size > 256 else 0.875)
    return Model(found, encoder, preprocess, guess.point or timm_point(encoder))


def _inside(weights: Weights) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix of the encoder's names, and its weights without it."""
    for prefix in PREFIXES:
        found = {_unchunked(name[len(prefix) :]): value for name, value in weights.items() if name.startswith(prefix)}
        if found and (is_vit(found) or found.keys() & FAMILIES.keys() or not prefix):
            return prefix, found
    return "", dict(weights)


def _unchunked(name: str) -> str:
    # Checkpoints of DINOv2's training have their blocks in chunks: blocks.CHUNK.BLOCK.
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)


def _of_timm(weights: Weights, given: str) -> Guess:
    known = common(weights)
    if known is None:
        raise UserError(
            f"the weights in '{given}' are of no kind that is known (the first are "
            f"{', '.join(map(repr, sorted(weights)[:3]))}): for a model of timm, say timm:NAME=FILE."
        )
    config, weights = known
    return Guess(f"timm's {config.model}, by its shapes", config, weights, None)


def _of_vit(prefix: str, weights: dict[str, Tensor], content: Mapping[str, object]) -> Guess:
    if is_beit(weights):
        return beit(weights)
    if "register_tokens" in weights or ("mask_token" in weights and "blocks.0.ls1.gamma" in weights):
        return dinov2(weights)
    weights = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in weights.items()}
    config = plain_vit(weights)
    width = len(weights["patch_embed.proj.weight"])
    if width % heads_of(width):
        raise UserError(f"no weight shows how many heads a ViT {width} wide has: name its model as timm:NAME=FILE.")
    if "base_encoder" in prefix:
        # MoCo v3's ViT-S has 12 heads of 32, where everybody else's has 6.
        config = replace(config, heads=12 if config.width == 384 else config.heads)
        return Guess("MoCo v3's base encoder", config, weights, "cls")
    if "decoder_pos_embed" in weights:
        return Guess("MAE's encoder, with its decoder", config, weights, "cls")
    if "teacher" in content:
        who = "iBOT" if "masked_embed" in weights else "DINO"
        return Guess(f"{who}'s teacher", config, weights, "cls")
    fixed = "fixed sine-cosine positions, as MAE and MoCo v3" if config.positions == "sincos" else "as DINO, DeiT, timm"
    return Guess(f"a plain ViT ({fixed})", config, weights, None)
