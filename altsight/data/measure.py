"""Samples of a data set, decoded and read once: what `altsight check` counts from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.decode import BrokenImage, decode
from altsight.data.sources import Source
from altsight.data.survey import Progress
from altsight.data.text import Tokenizer

IMAGE = np.dtype(
    [("sample", "<i8"), ("content", "<u8"), ("looks", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4")]
)
"""One image: its sample, hash of its bytes, difference hash of its pixels, size (0: broken), class (-1: none)."""
CAPTION = np.dtype([("sample", "<i8"), ("content", "<u8"), ("characters", "<u4"), ("tokens", "<u4")])
"""One caption: the sample it belongs to, hash of its text, length."""
CHUNK = 64


@dataclass(frozen=True)
class Measured:
    """Some samples: a row of IMAGE for each image, a row of CAPTION for each caption, and why images are broken.

    A sample that cannot be read at all has one broken image.
    """

    images: npt.NDArray[np.void]
    captions: npt.NDArray[np.void]
    broken: tuple[str, ...]


def measure(
    source: Source, samples: Sequence[int], tokenizer: Tokenizer | None, workers: int, progress: Progress
) -> Measured:
    """Decode the images of `samples` and read their captions, in `workers` processes (0: in this one).

    Raises:
        UserError: a shard cannot be read any more.
    """
    chunks = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
    loader = DataLoader(_Chunks(source, tokenizer), batch_size=None, sampler=chunks, num_workers=workers)
    parts: list[Measured] = []
    done = 0
    for chunk, part in zip(chunks, loader, strict=True):
        if isinstance(part, UserError):
            raise part
        parts.append(part)
        done += len(chunk)
        progress("decoding images", done, len(samples))
    return Measured(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.captions for part in parts]),
        tuple(name for part in parts for name in part.broken),
    )


@dataclass(frozen=True)
class _Chunks(Dataset[Measured | UserError]):
    """Map-style data set over lists of samples."""

    source: Source
    tokenizer: Tokenizer | None

    def __getitem__(self, samples: Sequence[int]) -> Measured | UserError:
        # A UserError travels back as a value: raised here, DataLoader would bury it in a worker's traceback.
        try:
            return self._measure(samples)
        except UserError as error:
            return error

    def _measure(self, samples: Sequence[int]) -> Measured:
        images: list[tuple[int, ...]] = []
        captions: list[tuple[int, ...]] = []
        broken: list[str] = []
        for i in samples:
            for text in self.source.texts(i):
                captions.append((i, text_hash(text), len(text), self.tokenizer.count(text) if self.tokenizer else 0))
            try:
                document = self.source.document(i, key(0, i))
                found, label = document.images, document.meta.get("label", -1)
            except BrokenImage as error:
                broken.append(f"{self.source.name(i)} ({error})")
                images.append((i, 0, 0, 0, 0, -1))
                continue
            for data in found:
                try:
                    images.append((i, _hash(data), *_looks(data), label))
                except BrokenImage as error:
                    broken.append(f"{self.source.name(i)} ({error})")
                    images.append((i, _hash(data), 0, 0, 0, label))
        return Measured(np.array(images, IMAGE), np.array(captions, CAPTION), tuple(broken))


def _looks(data: bytes) -> tuple[int, int, int]:
    pixels = decode(data)
    return difference_hash(pixels), int(pixels.shape[1]), int(pixels.shape[2])


def text_hash(text: str) -> int:
    """Return 64 bits of the SHA-256 of `text`."""
    return _hash(text.encode())


def difference_hash(image: Tensor) -> int:
    """Return 64 bits that near copies of an image share, for uint8 (3, H, W).

    A bit says whether a pixel of the 8 x 9 grey thumbnail is brighter than its left neighbour.
    """
    grey = F.resize(F.rgb_to_grayscale(image), [8, 9], antialias=True)[0]
    bits = (grey[:, 1:] > grey[:, :-1]).flatten().numpy()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
