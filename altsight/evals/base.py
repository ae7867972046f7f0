"""The evaluator contract, and the `View` that every evaluator sees.

A View comes from a running training, a saved run or imported weights; the evaluators cannot tell which, and that is
what makes their numbers comparable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.data.index import ROW, Index
from altsight.data.sources import Pairs
from altsight.data.views import center_crop
from altsight.nn.encoder import Encoded, Encoder, FeaturePoint
from altsight.nn.text import TextEncoder
from altsight.train.parallel import precision

ImageLike = str | Path | PIL.Image.Image | np.ndarray[Any, Any] | Tensor
"""A path, a PIL image, an array or tensor of uint8 (H, W, 3) or (3, H, W)."""


@dataclass(frozen=True)
class Preprocess:
    """Encoded or decoded image -> what the encoder sees in evaluation: shorter side resized, centre cut, normalised."""

    size: int
    normalization: str = "imagenet"
    crop_ratio: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False
    """Both sides are resized alike, whatever the aspect ratio (SigLIP)."""

    def hash(self) -> str:
        """Return 12 hex digits that name this preprocessing."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def __call__(self, data: bytes) -> Tensor:
        """Return uint8 (3, size, size)."""
        return center_crop(data, self.size, self.crop_ratio, self.interpolation, self.squash)

    def words(self) -> str:
        """Return what it does to an image, in words; zero-shot and retrieval report it (specification D1.6)."""
        side = round(self.size / self.crop_ratio)
        resized = f"{side} x {side}" if self.squash else f"shorter side {side}"
        return f"{resized} ({self.interpolation}), centre {self.size} x {self.size}, {self.normalization}"


@dataclass(frozen=True)
class Split:
    """Some samples of a source, under the name of their split."""

    name: str
    source: Pairs
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Labels, captions and, where they are small, decoded images: read once for all the views that are compared."""

    def __len__(self) -> int:
        return len(self.source)


def no_split(name: str) -> Split:
    """Return a split without samples: of a task that has only a test set, or only pictures to choose among."""
    return Split(name, Pairs(Index((), np.empty(0, ROW))))


@dataclass(frozen=True)
class Contest:
    """Images and captions that compete: image i and caption i belong together, further captions are wrong.

    images: paths. group: what is averaged by itself, as SugarCrepe's `swap_obj`.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Rating:
    """How alike people find two things: each is ("image" or "caption", its id)."""

    first: tuple[str, str]
    second: tuple[str, str]
    score: float


@dataclass(frozen=True)
class Task:
    """What is evaluated: data with optional labels and captions.

    Evaluators take what they need of it, and yield nothing where that is absent.
    """

    name: str
    train: Split
    val: Split
    test: Split
    label: str = ""
    """JSON field with the class of a sample."""
    prompts: tuple[str, ...] = ("{}",)
    """Templates with one `{}` for the class name (zero-shot)."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Label -> the name that stands in the prompts, in the order of the class ids; samples of other classes are left
    out. Empty: every label that occurs, sorted, its name the label in words."""
    multi_label: bool = False
    """The field `label` holds a list, and the metrics are `map11` and `map`."""
    metrics: tuple[str, ...] = ("top1", "top5", "mean_class")
    """Zero-shot metrics of a single label; known are also `top1_top5` and, of two classes, `roc_auc`."""
    caption_prompt: str = "{}"
    """What stands around a caption in retrieval, as "a photo of {}"."""
    clean: Task | None = None
    """The task whose accuracy this one's is compared with (robustness)."""
    contests: tuple[Contest, ...] = ()
    """Images and captions to be matched (compositional)."""
    ratings: tuple[Rating, ...] = ()
    """Similarities that people gave to images and captions of the test split (rated)."""
    image_id: str = ""
    """JSON field with the id by which the ratings name an image."""
    caption_ids: str = ""
    """JSON field with the list of ids by which they name its captions, in order; empty: their text."""
    corrupted_errors: Mapping[str, float] = field(default_factory=dict)
    """Corruption -> the mean error of the baseline, relative to which the mCE is given (corruptions)."""
    group: str = ""
    """The group of a suite that this task belongs to, as VTAB's "natural" (fewshot)."""

    @property
    def trains_probe(self) -> bool:
        """True if there are images with a single label to train a probe on, and to choose its strength by."""
        return bool(self.label) and not self.multi_label and bool(len(self.train)) and bool(len(self.val))


@dataclass(frozen=True)
class Result:
    """One number and all that is needed to know what it means; `value` is None where it is not applicable."""

    task: str
    evaluator: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    n: int = 0
    split: str = "test"
    feature_point: str = ""
    preprocess: str = ""
    data: str = ""
    """Hash of the evaluation data: the images, labels and captions that were used, in order."""
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Yields results of a View on a Task; listed in `altsight.evals.EVALUATORS`.

    Where the task lacks what is measured (labels, captions) it yields nothing; where the view lacks what it takes
    (a text tower) it yields results whose value is None and whose note says so.
    """

    def __call__(self, view: View, task: Task) -> Iterator[Result]: ...


@dataclass
class View:
    """An encoder ready to be evaluated: feature point, preprocessing, and the text tower if there is one."""

    name: str
    encoder: Encoder
    preprocess: Preprocess
    feature_point: FeaturePoint = "mean"
    text: TextEncoder | None = None
    embed_image: Callable[[Encoded], Tensor] | None = None
    """Encoded images -> the joint space (B, E) of a dual encoder: a bound method of the module with its weights."""
    project: nn.Module | None = None
    """Where tokens can be mapped to the joint space one by one, the map (..., D) -> (..., E)."""
    logit_scale: float = 100.0
    """What cosines are multiplied with before a softmax, as learned."""
    logit_bias: float = 0.0
    """What is then added, in a dual encoder with a sigmoid loss."""
    caption: Callable[..., list[str]] | None = None
    """Images (B, 3, size, size) uint8 -> captions, by `decoding`: where the weights have a decoder that writes."""
    batch_size: int = 256
    dtype: torch.dtype = torch.float32
    """bfloat16 computes the encoder in mixed precision, as it was trained; the features are fp32 in any case."""
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """Features that were already extracted, by the name of what they come from."""
    store: Path | None = None
    """Folder where extracted features are kept for later commands; None: they are kept in memory only."""

    @property
    def device(self) -> torch.device:
        """Where the encoder lives."""
        return next(self.encoder.parameters()).device

    @property
    def is_dual(self) -> bool:
        """True if images and texts share a space."""
        return self.text is not None

    @torch.inference_mode()
    def features(self, images: Sequence[ImageLike] | Tensor) -> Tensor:
        """Return the frozen features before any projection, fp32 (n, D) on the CPU.

        Args:
            images: paths, PIL images, arrays or tensors; or one uint8 tensor (n, 3, size, size).
        """
        return self.vectors(images)[0]

    def encode_image(self, images: Sequence[ImageLike] | Tensor) -> Tensor:
        """Return unit vectors (n, E) in the joint space of a dual encoder; without a text tower, the features."""
        features, joint = self.vectors(images)
        return features if joint is None else joint

    @torch.inference_mode()
    def vectors(self, images: Sequence[ImageLike] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features (n, D), and for a dual encoder the unit vectors (n, E) in the joint space; fp32, CPU."""
        self.encoder.eval()
        features, joint = [], []
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            pixels = chunk if isinstance(chunk, Tensor) else torch.stack([self._pixels(i) for i in chunk])
            with precision(self.device, self.dtype):
                encoded = self.encoder(self.encoder.normalize(pixels.to(self.device)))
            features.append(self.encoder.point(encoded, self.feature_point).float().cpu())
            if self.embed_image is not None:
                encoded = encoded.float()
                joint.append(F.normalize(self.embed_image(encoded).float(), dim=-1).cpu())
        return torch.cat(features), torch.cat(joint) if joint else None

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, E) in the joint space, fp32 on the CPU.

        Raises:
            UserError: this encoder was trained without a text tower.
        """
        if self.text is None:
            raise UserError(f"'{self.name}' has no text tower, so it cannot encode text: use a run of clip.")
        self.text.eval()
        parts = []
        for start in range(0, len(texts), self.batch_size):
            chunk = list(texts[start : start + self.batch_size])
            ids = self.text.encode(chunk).to(self.device)
            parts.append(F.normalize(self.text(ids).float(), dim=-1).cpu())
        return torch.cat(parts)

    def _pixels(self, image: ImageLike) -> Tensor:
        return self.preprocess(_encoded(image))


def not_applicable(view: View, task: Task, evaluator: str, metric: str, more: str = "") -> Result:
    """Return the result, without a number, of a view that has no text tower; `more` ends the note."""
    return Result(
        task.name,
        evaluator,
        metric,
        None,
        split=task.test.name,
        preprocess=view.preprocess.hash(),
        note=f"not applicable: this encoder has no text tower{more}",
    )


def _encoded(image: ImageLike) -> bytes:
    """Return the image as the bytes of a file, so that one preprocessing serves every kind of input."""
    import io

    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"the image '{image}' cannot be read ({error.strerror}).") from None
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise UserError(f"an image array must be uint8 (H, W, 3) or (3, H, W), not {image.dtype} {image.shape}.")
        image = PIL.Image.fromarray(image if image.shape[2] == 3 else np.moveaxis(image, 0, 2))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
