"""The contract that every pre-training method fulfils; see `docs/methods.md` for how to add one.

A method says *what* to compute. It never sees the optimizer, the rank, the precision, gradient accumulation or the
data order: those are written once, in `altsight.train`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.loader import Prepare
from altsight.data.mixture import Mixture
from altsight.data.prepared import Prepared
from altsight.data.sources import Interleaves, Source
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.nn.encoder import Encoded, Encoder, FeaturePoint
from altsight.nn.init import reset
from altsight.nn.text import TextEncoder

Samples = Literal["pairs", "documents", "mixed", "unknown"]
"""Whether the samples of a data set are image-text pairs, interleaved documents, or some of each."""


@dataclass(frozen=True)
class Corpus:
    """What a method may know of the data when it is built."""

    tokenizer: Tokenizer | None = None
    classes: tuple[str, ...] = field(default=())
    samples: Samples = "unknown"
    """unknown: nobody looked, as where a trained method is loaded."""

    @classmethod
    def of(cls, prepared: Prepared) -> Corpus:
        """Return the corpus of prepared data."""
        return cls(prepared.tokenizer, prepared.classes, _samples(prepared.source))

    def need_tokenizer(self, method: str) -> Tokenizer:
        """Return the tokenizer; UserError if the corpus has no text."""
        if self.tokenizer is None:
            raise UserError(f"{method} learns from text, and the data set has none: prepare it with --captions.")
        return self.tokenizer

    def need_classes(self, method: str) -> tuple[str, ...]:
        """Return the class names; UserError if the corpus has no labels."""
        if not self.classes:
            raise UserError(f"{method} learns from labels, and the data set has none: prepare it with --label FIELD.")
        return self.classes


def _samples(source: Source) -> Samples:
    if isinstance(source, Mixture):
        found = {_samples(part) for part in source.sources}
        return found.pop() if len(found) == 1 else "mixed"
    return "documents" if isinstance(source, Interleaves) and not source.as_pairs else "pairs"


class Method(nn.Module):
    """Base of all methods. A subclass is built as `Class(config, encoder, corpus)` and overrides what it needs."""

    Config: ClassVar[type]
    """A frozen dataclass with every hyper-parameter of the method at its source's default."""
    optim: ClassVar[OptimConfig]
    """The source's optimizer and schedule."""
    shares: ClassVar[bool] = False
    """True where `embed` returns `shared` tensors for `loss`."""
    masked: ClassVar[bool] = False
    """True where the encoder must be able to encode visible patches only."""
    drops_patches: ClassVar[bool] = False
    """True where plain passes of an image heed `batch.get("visible")`, the patches that patch dropout leaves."""
    least_batch: ClassVar[int] = 1
    """Smallest global batch that the loss is defined on: 2 where samples are told from each other."""

    feature_point: ClassVar[FeaturePoint] = "mean"
    """Where the method's frozen features are read."""
    text: TextEncoder | None
    """The text tower of a dual encoder."""
    image_projection: nn.Module | None
    """Features at `feature_point` -> the joint space of a dual encoder."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        # On the instance: a None on the class would hide the module that a subclass assigns.
        self.text = None
        self.image_projection = None

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer, the encoder's from `at.child("encoder")` as under every other method."""
        reset(self)
        self.encoder.init_weights(at)

    @property
    def evaluated(self) -> Encoder:
        """The encoder that is evaluated and exported: the one that is trained, or its teacher."""
        return self.encoder

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the image vectors (B, E) of a dual encoder in the joint space, un-normalised."""
        features = self.encoder.point(encoded, self.feature_point)
        return features if self.image_projection is None else self.image_projection(features)

    def similarity(self) -> tuple[float, float]:
        """Return what a dual encoder's cosines are multiplied with, and what is added, to be logits."""
        scale = getattr(self, "logit_scale", None)
        return (float(scale.detach().exp()), 0.0) if isinstance(scale, Tensor) else (100.0, 0.0)

    def prepare(self, crop: Crop, size: int) -> Prepare:
        """Return the picklable preparation of one document for this method.

        Args:
            crop: the crop that all methods of a study share.
            size: side of the encoder's input in pixels; a curriculum asks for smaller ones than the encoder's own.
        """
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the denominator of every local loss over this micro-batch (0-d), known before the forward."""
        return {}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Compute one micro-batch; never communicates."""
        raise NotImplementedError

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of each loss over the global batch (the shares of all ranks sum to the loss).

        `shared` holds the rows of this rank's whole batch. May gather.
        """
        return {}

    def weights(self) -> dict[str, float]:
        """Return name -> weight of each loss in the total; a name that is missing has weight 1."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides those with fewer than two dimensions."""
        return set()

    def start_step(self, at: Progress) -> None:
        """Called before every step: set what depends on how far the run is (a teacher's temperature)."""

    def after_step(self, at: Progress) -> None:
        """Called after every optimizer step with the progress before it: clamps, EMA teachers, centres."""

    def lr_scales(self) -> dict[str, float]:
        """Return prefix of parameter names -> factor on their learning rate."""
        return {}

    def constant_lr(self) -> tuple[str, ...]:
        """Return prefixes of the names of parameters whose learning rate stays at its peak (SimSiam's predictor)."""
        return ()

    def report(self) -> dict[str, float]:
        """Return scalars worth a log line (a temperature, a teacher's entropy)."""
        return {}


def check_encoder(name: str, method: type[Method], encoder: Encoder) -> None:
    """Raise UserError if the method called `name` masks patches and the encoder has none."""
    if method.masked and not encoder.is_vit:
        raise UserError(
            f"{name} masks patches, and '{encoder.config.model}' has none: use a ViT such as vit_base_patch16_224."
        )


def summary(method: Method) -> dict[str, Any]:
    """Return the number of parameters that the method trains, and those of its encoder."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in method.encoder.parameters())
    return {"trained": trained, "encoder": encoder}
