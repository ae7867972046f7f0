"""Pictures for the report, made by the trained methods from held-out images that nobody chose.

The images lie at even distances in the test split, so a second study shows the same ones.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image as PillowImage
from torch import Tensor

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.views import Crop
from altsight.evals.base import Split, Task, View
from altsight.evals.features import captions_of, extract, joint_vectors
from altsight.evals.load import load_method, view_of
from altsight.methods.base import Method
from altsight.study.result import StudyResult
from altsight.train.run import pick_device

IMAGES = 8
QUERIES = 4
TOP = 5
PIXELS = 160
"""Largest side of a picture in the report."""
WHOLE = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
"""The largest central square: no augmentation."""
GREY = 128


@dataclass(frozen=True)
class HeldOut:
    """A test image as a data URI, and its true captions."""

    picture: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Rebuilt:
    """What a method saw of a held-out image, and what it made of it; data URIs."""

    masked: str
    reconstruction: str


@dataclass(frozen=True)
class TextQuery:
    """A caption and the nearest test images, nearest first: (picture, its first caption, right)."""

    text: str
    found: tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True)
class ImageQuery:
    """A test image and the nearest captions, nearest first: (caption, right)."""

    picture: str
    captions: tuple[str, ...]
    found: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Gallery:
    """All pictures of the report; dicts are by arm."""

    task: str = ""
    images: tuple[HeldOut, ...] = ()
    rebuilt: dict[str, tuple[Rebuilt, ...]] = field(default_factory=dict)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    by_text: dict[str, tuple[TextQuery, ...]] = field(default_factory=dict)
    by_image: dict[str, tuple[ImageQuery, ...]] = field(default_factory=dict)


def make_gallery(result: StudyResult, task: Task) -> Gallery:
    """Return the pictures of every trained arm under the first seed. Collective: every rank calls it."""
    gallery = Gallery(task.name)
    device = pick_device(result.plan.train.device)
    for name in result.names:
        arm = result.of(name)[0]
        if arm.summary is None:
            continue
        _, method = load_method(result.path(arm))
        view = view_of(method.to(device), name)
        chosen = _spread(extract(view, task.test).kept, IMAGES)
        if not gallery.images:
            gallery = Gallery(task.name, tuple(_held_out(task.test, view, i) for i in chosen))
        _reconstruct(gallery, name, method, task.test, chosen)
        if view.is_dual and any(captions_of(task.test)):
            gallery.by_text[name], gallery.by_image[name] = _retrieve(view, task.test)
    return gallery


def _reconstruct(gallery: Gallery, name: str, method: Method, split: Split, chosen: Sequence[int]) -> None:
    """Add the method's reconstructions and captions to `gallery`, where it makes any."""
    maker: Any = method
    if not (hasattr(maker, "reconstruct") or hasattr(maker, "caption")):
        return
    batch = _batch(method, split, chosen)
    if batch is None:
        return
    if hasattr(maker, "reconstruct"):
        masked = _masked(method, batch)
        rebuilt = (maker.reconstruct(batch).cpu() * 255).round().to(torch.uint8)
        gallery.rebuilt[name] = tuple(Rebuilt(_uri(m), _uri(r)) for m, r in zip(masked, rebuilt, strict=True))
    if hasattr(maker, "caption"):
        # From what is visible in training, and from the start token alone: the corpus sets the first word.
        visible = {} if batch.get("keep") is None else {"keep": batch["keep"]}
        images = batch["image"] if batch["image"].ndim == 4 else batch["image"][:, 0]  # a pair as a document of one
        gallery.captions[name] = tuple(maker.caption(images, prefix="", **visible))


def _batch(method: Method, split: Split, chosen: Sequence[int]) -> Batch | None:
    """Return the chosen images as the method sees them, uncropped; None if it cannot use one of them."""
    prepare = method.prepare(WHOLE, method.encoder.config.img_size)
    examples = []
    for i in chosen:
        at = key(0, i, "gallery")
        example = prepare(split.source.document(i, at), at)
        if example is None:
            return None
        examples.append(example)
    tensors = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
    index = torch.tensor(list(chosen))
    return Batch(tensors, index, index).to(next(method.parameters()).device)


def _masked(method: Method, batch: Batch) -> Tensor:
    """Return uint8 (B, 3, H, W) on the CPU with the patches that are hidden in grey."""
    images, encoder = batch["image"].cpu(), method.encoder
    if batch.get("keep") is None:
        visible = ~batch["mask"].cpu()
    else:
        visible = torch.zeros(len(images), encoder.num_patches, dtype=torch.bool).scatter(1, batch["keep"].cpu(), True)
    side = encoder.patch_size
    pixels = visible.view(-1, 1, *encoder.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(pixels, images, GREY)


def _retrieve(view: View, split: Split) -> tuple[tuple[TextQuery, ...], tuple[ImageQuery, ...]]:
    kept, captions = extract(view, split).kept, captions_of(split)
    images = joint_vectors(view, split)
    texts = list(dict.fromkeys(c for i in kept for c in captions[i]))
    vectors = view.encode_text(texts)
    rows = [row for row, i in enumerate(kept) if captions[i]]
    by_text, by_image = [], []
    for row in _spread(rows, QUERIES):
        text = captions[kept[row]][0]
        near = (images @ vectors[texts.index(text)]).topk(min(TOP, len(images))).indices.tolist()
        found = tuple(_found(split, view, kept[i], captions[kept[i]], text) for i in near)
        by_text.append(TextQuery(text, found))
        best = (vectors @ images[row]).topk(min(TOP, len(texts))).indices.tolist()
        own = captions[kept[row]]
        answers = tuple((texts[i], texts[i] in own) for i in best)
        by_image.append(ImageQuery(_picture(split, view, kept[row]), tuple(own), answers))
    return tuple(by_text), tuple(by_image)


def _found(split: Split, view: View, i: int, captions: Sequence[str], text: str) -> tuple[str, str, bool]:
    return _picture(split, view, i), captions[0] if captions else "", text in captions


def _held_out(split: Split, view: View, i: int) -> HeldOut:
    return HeldOut(_picture(split, view, i), tuple(split.source.all_captions(i)))


def _picture(split: Split, view: View, i: int) -> str:
    return _uri(view.preprocess(split.source.image(i)))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` items at even distances (all of them where there are fewer)."""
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)] if len(items) > count else list(items)


def _uri(pixels: Tensor) -> str:
    """Return uint8 (3, H, W) as the data URI of a WebP picture."""
    picture = PillowImage.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
