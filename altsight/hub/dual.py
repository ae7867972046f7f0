"""A dual encoder in parts that other libraries have too, whether it was read or trained here; and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.hub.model import Found, Model
from altsight.hub.parity import TEXTS, largest, pictures
from altsight.methods.base import Method
from altsight.methods.composite import Composite
from altsight.methods.lit import LiT
from altsight.methods.siglip import SigLIP
from altsight.nn.encoder import Encoder, FeaturePoint
from altsight.nn.pool import MAPHead
from altsight.nn.text import TextTower


@dataclass(frozen=True)
class Foreign:
    """What another library makes of an export: the functions that its self-check compares with the original.

    image: normalised images (B, 3, S, S) -> vectors (B, E). text: texts -> vectors (n, E). scale, bias: of the logits.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Sequence[str]], Tensor]
    scale: float
    bias: float


@torch.inference_mode()
def differences(view: View, foreign: Foreign) -> dict[str, float]:
    """Return the largest differences of unit vectors of images and of texts, and of logits in units of their scale."""
    assert view.text is not None and view.embed_image is not None
    images = view.encoder.eval().normalize(pictures(view).to(view.device))
    ours = (
        F.normalize(view.embed_image(view.encoder(images)), dim=-1).cpu(),
        F.normalize(view.text.eval()(view.text.encode(TEXTS).to(view.device)), dim=-1).cpu(),
    )
    theirs = (F.normalize(foreign.image(images.cpu()), dim=-1), F.normalize(foreign.text(TEXTS), dim=-1))
    logits = view.logit_scale * ours[0] @ ours[1].T + view.logit_bias
    other = foreign.scale * theirs[0] @ theirs[1].T + foreign.bias
    return {
        "image vectors": largest(ours[0], theirs[0]),
        "text vectors": largest(ours[1], theirs[1]),
        "logits": largest(logits / view.logit_scale, other / view.logit_scale),
    }


def as_model(view: View) -> Model:
    """Return the dual encoder of `view` as encoder, place where it is read, projection and text tower; weights shared.

    Raises:
        UserError: it has no text tower, or its image side is none of these parts.
    """
    if view.embed_image is None or view.text is None:
        raise UserError(f"'{view.name}' has no text tower, so it is no dual encoder: export it for timm.")
    owner = view.embed_image.__self__  # type: ignore[attr-defined]
    if isinstance(owner, Composite) and owner.dual is not None:
        owner = owner.parts[owner.dual]
    found = Found(f"a run of {type(owner).__name__} of Altsight")
    parts: dict[str, Any] = {"text": view.text, "logit_scale": view.logit_scale, "logit_bias": view.logit_bias}
    if isinstance(owner, Model):
        # Of the view, whose encoder may have been tuned or resized since.
        parts |= {"joint_point": owner.joint_point, "image_pool": owner.image_pool}
        parts |= {"image_projection": owner.image_projection}
        return Model(owner.found, view.encoder, view.preprocess, owner.feature_point, **parts)
    if isinstance(owner, SigLIP):
        return Model(found, _with_pool(view.encoder, owner.pool), view.preprocess, "pooled", **parts)
    point: FeaturePoint = owner.config.image_feature if isinstance(owner, LiT) else owner.feature_point
    if not isinstance(owner, LiT) and getattr(type(owner), "embed_image", None) is not Method.embed_image:
        raise UserError(
            f"images of '{view.name}' ({type(owner).__name__}) are read in a way that only Altsight has: export it to "
            "onnx or safetensors."
        )
    return Model(found, view.encoder, view.preprocess, point, image_projection=owner.image_projection, **parts)


def _with_pool(encoder: Encoder, head: MAPHead) -> Encoder:
    """Return a copy of `encoder` whose backbone pools its patches as `head` does.

    Raises:
        UserError: it is no vision transformer of timm's plain kind.
    """
    if not is_plain(encoder):
        raise UserError(f"'{encoder.config.model}' pooled by attention is nothing that other libraries have.")
    made = Encoder(replace(encoder.config, global_pool="map"))
    made.load_state_dict(encoder.state_dict(), strict=False)
    pool, attention = made.backbone.attn_pool, head.pool
    if pool.mlp.fc1.out_features != head.mlp.fc1.out_features:
        raise UserError(f"timm pools the patches of '{encoder.config.model}' with a feed-forward of another width.")
    # A bias on the keys would change nothing, so the head has none.
    no_bias = torch.zeros_like(attention.value.bias)
    state = {
        "latent": attention.queries[None],
        **_of("q", attention.query),
        "kv.weight": torch.cat([attention.key.weight, attention.value.weight]),
        "kv.bias": torch.cat([no_bias, attention.value.bias]),
        **_of("proj", attention.out),
        **_of("norm", head.norm),
        **_of("mlp.fc1", head.mlp.fc1),
        **_of("mlp.fc2", head.mlp.fc2),
    }
    pool.load_state_dict(state)
    return made.to(next(encoder.parameters()).device).eval()


def _of(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def is_plain(encoder: Encoder) -> bool:
    """Return whether `encoder` is timm's plain vision transformer of plain blocks, with nothing that Altsight adds."""
    if type(encoder.backbone) is not VisionTransformer or encoder.relative is not None:
        return False
    block: Any = encoder.backbone.blocks[0]
    extras = (block.attn.q_norm, block.attn.norm, block.mlp.norm) if type(block.mlp) is Mlp else (block.mlp,)
    return type(block) is Block and all(isinstance(extra, nn.Identity) for extra in extras)


def need_tower(model: Model, library: str) -> TextTower:
    """Return the text tower of `model`; UserError if it is none that `library` has."""
    if not isinstance(model.text, TextTower):
        raise UserError(
            f"{library} has no text tower like this one ({type(model.text).__name__}): export to onnx or safetensors."
        )
    return model.text


def need_plain_map(model: Model, library: str) -> None:
    """Raise UserError if images are mapped to the joint space by more than one matrix, which `library` lacks."""
    projection = model.image_projection
    plain = projection is None or (isinstance(projection, nn.Linear) and projection.bias is None)
    if model.image_pool is not None or not plain:
        raise UserError(
            f"{library} maps images to the joint space by one matrix without bias, which this model does not."
        )


def image_map(model: Model) -> Tensor:
    """Return the matrix (E, D) from image features to the joint space; the identity where they are there already."""
    projection = model.image_projection
    return torch.eye(model.encoder.width) if projection is None else projection.get_parameter("weight").detach().cpu()


def position_table(encoder: Encoder, with_bias: bool = True) -> Tensor:
    """Return (prefix + L, D): what is added to the tokens of a plain vision transformer, fixed positions included.

    with_bias: add the bias of the patches, for libraries whose patches have none; it is the same at all positions.
    """
    backbone = encoder.backbone
    table = torch.zeros(encoder.prefix + encoder.num_patches, encoder.width)
    if backbone.pos_embed is not None:
        rows = backbone.pos_embed[0].detach().cpu()
        table[-len(rows) :] += rows
    if with_bias and backbone.patch_embed.proj.bias is not None:
        table[encoder.prefix :] += backbone.patch_embed.proj.bias.detach().cpu()
    return table


def norm_eps(encoder: Encoder) -> float:
    """Return what the layer norms of a plain vision transformer add to the variance."""
    return float(encoder.backbone.blocks[0].norm1.eps)
