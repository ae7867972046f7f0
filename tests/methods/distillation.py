"""What the tests of DINO, iBOT and DINOv2 share: batches, and slow references in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from altsight.core.rng import key
from altsight.core.types import Batch, Document
from altsight.data.photometric import photometric
from altsight.data.views import Crop
from altsight.methods.base import Method
from altsight.nn.encoder import Encoder
from altsight.nn.heads import PrototypeHead


def batch_of(method: Method, document: Callable[..., Document], samples: int = 3, size: int = 32) -> Batch:
    """Prepare `samples` views of one picture, at positions 0, 1, ..."""
    prepare = method.prepare(Crop(), size)
    examples = [prepare(document(), key(0, position)) for position in range(samples)]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in examples[0] or {}}
    return Batch(tensors, torch.arange(samples), torch.arange(samples))


def stir(method: Method, centres: tuple[Tensor, ...]) -> None:
    """Move everything away from its start, so that student and teacher differ and centres are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for centre in centres:
            centre += 0.05 * torch.randn(centre.shape, generator=generator)


def view(encoder: Encoder, batch: Batch, sample: int, number: int, local: bool = False) -> Tensor:
    """One view of one sample, coloured and normalised: (1, 3, H, W)."""
    pixels, colour = (batch["local"], batch["local_colour"]) if local else (batch["image"], batch["colour"])
    images = photometric(pixels.flatten(0, 1), colour.flatten(0, 1))
    return encoder.normalize(images[sample * pixels.shape[1] + number, None])


def slow_logits(head: PrototypeHead, feature: Tensor) -> list[float]:
    """Cosines of the head's vector with the prototypes, times their lengths."""
    vector = head.mlp(feature).double().tolist()
    norm = math.sqrt(sum(x * x for x in vector))
    logits = []
    for direction, length in zip(
        head.direction.double().tolist(), head.length.double().flatten().tolist(), strict=True
    ):
        product = sum(x * y for x, y in zip(vector, direction, strict=True))
        logits.append(length * product / (norm * math.sqrt(sum(y * y for y in direction))))
    return logits


def slow_softmax(logits: list[float], temperature: float, centre: list[float] | None = None) -> list[float]:
    """Softmax of (logits - centre) / temperature."""
    powers = [math.exp((x - c) / temperature) for x, c in zip(logits, centre or [0.0] * len(logits), strict=True)]
    return [p / sum(powers) for p in powers]


def slow_ce(student: list[float], target: list[float]) -> float:
    """Cross-entropy of the student's logits at temperature .1."""
    return -sum(t * math.log(p) for t, p in zip(target, slow_softmax(student, 0.1), strict=True))


def slow_view_loss(students: list[list[list[float]]], targets: list[list[list[float]]]) -> float:
    """Mean over samples and over pairs of a teacher's and another view; students: [sample][view], targets likewise."""
    total = 0.0
    for views, told in zip(students, targets, strict=True):
        terms = [slow_ce(s, t) for i, t in enumerate(told) for j, s in enumerate(views) if i != j]
        total += sum(terms) / len(terms)
    return total / len(students)
