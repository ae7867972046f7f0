"""What is read from anyone's weights: the encoder, what surrounds it, and what the file was recognised as."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from altsight.evals.base import Preprocess, View
from altsight.nn.encoder import Encoded, Encoder, FeaturePoint, check_point
from altsight.nn.text import TextEncoder


@dataclass(frozen=True)
class Found:
    """How a source of weights was understood.

    recognised: what it is, in a few words. left_over: names in the file that nothing here has a place for. missing:
    names that the encoder has and the file lacks; they keep their initial values.
    """

    recognised: str
    left_over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class Model(nn.Module):
    """An encoder with what makes it a `View`: preprocessing, feature point and, in a dual encoder, the text side.

    Args:
        found: how the weights were understood.
        encoder: with its weights.
        preprocess: what its images went through when it was evaluated by those who trained it.
        feature_point: where its frozen features are read.
        text: the text tower of a dual encoder, with its tokenizer.
        image_projection: features at `joint_point` -> the joint space; None: they are there already.
        joint_point: where the vectors of the joint space are read; None: at `feature_point`.
        image_pool: tokens (B, prefix + L, D) -> features (B, D'), which takes the place of the joint point.
        logit_scale: what cosines are multiplied with before a softmax.
        logit_bias: what is then added, in a dual encoder with a sigmoid loss.

    Raises:
        UserError: there is no such feature point.
    """

    text: TextEncoder | None
    image_projection: nn.Module | None
    image_pool: nn.Module | None

    def __init__(
        self,
        found: Found,
        encoder: Encoder,
        preprocess: Preprocess,
        feature_point: FeaturePoint,
        text: TextEncoder | None = None,
        image_projection: nn.Module | None = None,
        joint_point: FeaturePoint | None = None,
        image_pool: nn.Module | None = None,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
    ) -> None:
        super().__init__()
        check_point(feature_point)
        self.found = found
        self.encoder = encoder
        self.preprocess = preprocess
        self.feature_point = feature_point
        self.joint_point = joint_point or feature_point
        self.text = text
        self.image_projection = image_projection
        self.image_pool = image_pool
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the image vectors (B, E) of a dual encoder in the joint space, un-normalised."""
        if self.image_pool is not None:
            features: Tensor = self.image_pool(encoded.tokens)
        else:
            features = self.encoder.point(encoded, self.joint_point)
        return features if self.image_projection is None else self.image_projection(features)

    def view(self, name: str) -> View:
        """Return the View called `name`, in eval mode; it shares these weights."""
        self.eval()
        dual = self.text is not None
        # Tokens can be mapped one by one only where the features are a token or a mean of tokens.
        tokenwise = dual and self.image_pool is None and self.joint_point != "pooled"
        return View(
            name=name,
            encoder=self.encoder,
            preprocess=self.preprocess,
            feature_point=self.feature_point,
            text=self.text,
            embed_image=self.embed_image if dual else None,
            project=self.image_projection if tokenwise else None,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
        )
