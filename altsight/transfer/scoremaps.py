"""DenseCLIP's decoder: maps of how well every place fits every class name, and what is predicted from them (7.1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.evals.base import View
from altsight.nn.context import ContextDecoder
from altsight.nn.dense import FeatureMaps, to_map
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.prompts import LearnedPrompts
from altsight.nn.semantic_fpn import SemanticFPN
from altsight.nn.text import TextTower
from altsight.transfer.base import ImageTower, name_of_projection

Prompting = Literal["post", "pre", "none"]
"""Where the image changes the classes' vectors: after the text tower (t + gamma v), before it, or nowhere."""
GAMMA = 1e-4
"""How much of the context is added to a class's vector at the start."""


class ScoreMaps(nn.Module):
    """Encoded images -> logits of a Semantic FPN that sees the score maps, and in training the score maps themselves.

    score(k, place) = cosine of the place's vector in the joint space with the vector of class k. Call `init_weights`
    before use; what comes from the view is left as it is then.

    Args:
        tower: the copy of the view's image side, whose encoder is trained.
        contexts, room: of the prompts.
        layers: of the context decoder.
        temperature: what the scores are divided by in their own loss.

    Raises:
        UserError: the view cannot map single places to the joint space, or its text tower takes no learned vectors.
    """

    def __init__(
        self,
        view: View,
        tower: ImageTower,
        names: Sequence[str],
        prompting: Prompting,
        contexts: int,
        room: int,
        layers: int,
        channels: int,
        temperature: float,
    ) -> None:
        super().__init__()
        encoder = tower.encoder
        check_dense(view)
        if not isinstance(view.text, TextTower):
            raise UserError(
                f"the text tower of '{view.name}' takes no learned vectors: use a run of clip, or OpenCLIP's."
            )
        self.tower, self.prompting, self.temperature = tower, prompting, temperature
        self.feature_point, self.project = view.feature_point, projection_of(view, tower)
        self.prompts = LearnedPrompts(copy.deepcopy(view.text), names, contexts, room)
        width = view.text.text_projection.out_features
        if prompting != "none":
            self.context = ContextDecoder(width if prompting == "post" else view.text.config.width, width, layers)
        if prompting == "post":
            self.gamma = nn.Parameter(torch.empty(width))
        self.maps = FeatureMaps(encoder, norm=True)
        # The scores join the map of their own stride: the patches', or the last stage's.
        self.joined = 2 if self.maps.is_plain else 3
        widths = [n + len(names) * (level == self.joined) for level, n in enumerate(self.maps.channels)]
        self.fpn = SemanticFPN(widths, len(names), channels)

    def init_weights(self, at: Key) -> None:
        """Set from `at` what does not come from the view."""
        self.prompts.init_weights(at.child("prompts"))
        self.maps.init_weights(at.child("maps"))
        self.fpn.init_weights(at.child("fpn"))
        if self.prompting != "none":
            self.context.init_weights(at.child("context"))
        if self.prompting == "post":
            nn.init.constant_(self.gamma, GAMMA)

    def forward(self, encoder: Encoder, encoded: Encoded) -> dict[str, Tensor]:
        scores = self.scores(encoder, encoded)
        maps = self.maps(encoder, encoded)
        maps[self.joined] = torch.cat([maps[self.joined].float(), scores], dim=1)
        logits = {"segmentation": self.fpn(maps)}
        return logits | {"auxiliary": scores / self.temperature} if self.training else logits

    def scores(self, encoder: Encoder, encoded: Encoded) -> Tensor:
        """Return the cosines (B, K, H, W) of every place with every class, fp32."""
        places = self.project(dense_features(encoder, encoded, self.feature_point))
        vectors = self.classes(torch.cat([self.tower(encoded)[:, None], places], dim=1))
        # Norms and products in fp32, also where the towers run in bf16.
        with torch.autocast(places.device.type, enabled=False):
            cosines = F.normalize(places.float(), dim=-1) @ F.normalize(vectors.float(), dim=-1).mT
        return to_map(cosines, encoder.grid)

    def classes(self, image: Tensor) -> Tensor:
        """Return the vectors of all classes (K, E), or (B, K, E) where they heed an image's tokens (B, 1 + L, E)."""
        if self.prompting == "pre":
            return self.prompts(self.context(self.prompts.contexts.expand(len(image), -1, -1), image))
        vectors: Tensor = self.prompts()
        if self.prompting == "none":
            return vectors
        return vectors + self.gamma * self.context(vectors.expand(len(image), -1, -1), image)


def dense_features(encoder: Encoder, encoded: Encoded, feature_point: str) -> Tensor:
    """Return what a dual encoder projects, of every place (B, L, D) instead of the whole image.

    Patch tokens where the feature is the CLS token or the mean of the patches; in CLIP's ResNets ("pooled") the
    attention pool is asked by every place instead of the mean only.
    """
    if feature_point == "pooled":
        # A shallow copy, which shares the weights and hands out all places.
        pool = copy.copy(encoder.backbone.head)
        pool.pool_type = ""
        return pool(encoded.layers[-1], pre_logits=True).flatten(2).mT
    tokens = encoded.prenorm if feature_point.endswith("_prenorm") else encoded.tokens
    return tokens[:, encoded.prefix :]


def check_dense(view: View) -> None:
    """Raise UserError if `view` cannot map single places of an image to the joint space."""
    if not _name_of_projection(view):
        raise UserError(
            f"'{view.name}' maps whole images to the joint space and no single places: use weights that project a "
            "token, such as CLIP's."
        )


def projection_of(view: View, tower: ImageTower) -> nn.Module:
    """Return the copy in `tower` of the map from places to the joint space."""
    return tower.owner.get_submodule(_name_of_projection(view))


def _name_of_projection(view: View) -> str:
    """Return the name of that map in the module that embeds images; empty where it has none."""
    if view.feature_point == "pooled":
        owner: nn.Module = view.embed_image.__self__  # type: ignore[union-attr]
        # A view says nothing of tokens then, but what an attention pool returns for a place is projected alike.
        attends = isinstance(getattr(view.encoder.backbone, "head", None), AttentionPool2d)
        found = isinstance(getattr(owner, "image_projection", None), nn.Module)
        return "image_projection" if attends and found else ""
    return name_of_projection(view)
