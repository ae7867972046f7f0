"""Image-text retrieval, both ways: R@1, R@5 and R@10 on the whole test split (specification D2).

A caption is scored on its exact index: where several images share a caption word for word, only the image that is asked
for counts, and equal similarities are ordered by index. An encoder that maps everything to one point therefore scores
what chance gives, not 100 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from altsight.evals.base import Result, Task, View, not_applicable
from altsight.evals.bootstrap import scored
from altsight.evals.features import captions_of, content_hash, extract, finite, join_notes, joint_vectors, left_out

TOP = (1, 5, 10)
BLOCK_ELEMENTS = 2**24
"""Similarities held at a time."""


@dataclass(frozen=True)
class Gallery:
    """The images and captions of a split in the joint space.

    images: unit vectors (n, E). texts: unit vectors (u, E) of the distinct captions. captions: (m,) row in `texts` of
    every caption, in the order of the images. owners: (m,) its image.
    """

    images: Tensor
    texts: Tensor
    captions: Tensor
    owners: Tensor

    @property
    def counts(self) -> Tensor:
        """Number of captions (n,) of every image."""
        return self.owners.bincount(minlength=len(self.images))


def retrieval(view: View, task: Task) -> Iterator[Result]:
    """Yield image -> text and text -> image recall on the test split; images without a caption are left out."""
    captions = captions_of(task.test)
    if not any(captions):
        return
    metrics = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in TOP]
    if not view.is_dual:
        for metric in metrics:
            yield not_applicable(view, task, "retrieval", metric)
        return
    extracted = extract(view, task.test)
    rows = [row for row, sample in enumerate(extracted.kept) if captions[sample]]
    used = [captions[extracted.kept[row]] for row in rows]
    gallery = _gallery(view, joint_vectors(view, task.test)[rows], used, task.caption_prompt)
    shared = Counter(text for texts in used for text in set(texts))
    several = sum(shared[text] > 1 for texts in used for text in texts)
    note = left_out(task.test, {"a broken image": extracted.broken, "no caption": len(extracted.kept) - len(rows)})
    data = content_hash((extracted.digests[row], texts) for row, texts in zip(rows, used, strict=True))
    sizes = gallery.counts
    for way, found, chances in (
        ("image_to_text", image_to_text(gallery, view.device), [_chance_to_text(sizes, k) for k in TOP]),
        ("text_to_image", text_to_image(gallery, view.device), [min(1.0, k / len(rows)) for k in TOP]),
    ):
        for k, chance in zip(TOP, chances, strict=True):
            yield scored(
                view,
                found < k,
                # The captions of one image are not independent test items.
                sizes if way == "text_to_image" and len(gallery.owners) > len(rows) else None,
                task=task.name,
                evaluator="retrieval",
                metric=f"{way}_r{k}",
                chance=chance,
                split=task.test.name,
                feature_point=f"{view.feature_point}, projected",
                data=data,
                note=join_notes(note, f"{several:,} captions belong to several images" if several else ""),
                extra={
                    "images": len(rows),
                    "captions": len(gallery.owners),
                    "shared_captions": several,
                    "caption_prompt": task.caption_prompt,
                    "preprocess": view.preprocess.words(),
                },
            )


def image_to_text(gallery: Gallery, device: torch.device | str = "cpu") -> Tensor:
    """Return, for each image (n,), the rank (0 is first) among all captions of the best-ranked one of its own."""
    texts, captions, owners = gallery.texts.to(device), gallery.captions.to(device), gallery.owners.to(device)
    found = []
    step = max(1, BLOCK_ELEMENTS // len(captions))
    for start in range(0, len(gallery.images), step):
        block = gallery.images[start : start + step].to(device)
        # Equal captions get equal similarities: they are computed once and copied.
        scores = (block @ texts.T)[:, captions]
        own = owners == torch.arange(start, start + len(block), device=device)[:, None]
        best = scores.masked_fill(~own, -torch.inf).argmax(dim=1)
        found.append(ranks(scores, best).cpu())
    return torch.cat(found)


def text_to_image(gallery: Gallery, device: torch.device | str = "cpu") -> Tensor:
    """Return, for each caption (m,), the rank (0 is first) of its image among all images."""
    images, texts = gallery.images.to(device), gallery.texts.to(device)
    found = []
    step = max(1, BLOCK_ELEMENTS // len(images))
    for captions, owners in zip(gallery.captions.split(step), gallery.owners.split(step), strict=True):
        found.append(ranks(texts[captions.to(device)] @ images.T, owners.to(device)).cpu())
    return torch.cat(found)


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Return the rank (n,) of column `target` (n,) in each row of `scores` (n, m); 0 is first, ties go by index."""
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def _gallery(view: View, images: Tensor, captions: list[list[str]], prompt: str) -> Gallery:
    flat = [text for texts in captions for text in texts]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(flat))}
    return Gallery(
        images,
        finite(view.encode_text([prompt.replace("{}", text) for text in distinct]), view),
        torch.tensor([distinct[text] for text in flat]),
        torch.tensor([image for image, texts in enumerate(captions) for _ in texts]),
    )


def _chance_to_text(counts: Tensor, k: int) -> float:
    """Return the chance that k of all captions, drawn blindly, hold one of an image's own; the mean over images."""
    total = int(counts.sum())
    missed = torch.ones(len(counts), dtype=torch.float64)
    for drawn in range(min(k, total)):
        missed *= ((total - drawn - counts.double()) / (total - drawn)).clamp(min=0)
    return float((1 - missed).mean())
