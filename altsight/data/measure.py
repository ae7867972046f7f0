"""Samples of a data set, decoded and read once: what `altsight check` counts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Document
from altsight.data.decode import BrokenImage, decode
from altsight.data.sources import Source
from altsight.data.survey import THREADS, Progress
from altsight.data.text import Tokenizer

IMAGE = np.dtype(
    [
        *(("sample", "<i8"), ("content", "<u8"), ("bytes", "<u8"), ("looks", "<u8")),
        *(("height", "<u4"), ("width", "<u4"), ("label", "<i4")),
    ]
)
"""One image: its sample, hash and number of its bytes, difference hash and size of its pixels (0: broken), class
(-1: none)."""
CAPTION = np.dtype([("sample", "<i8"), ("content", "<u8"), ("characters", "<u4"), ("tokens", "<u4")])
"""One caption: its sample, hash of its text, length; tokens without start and end, 0 where there is no tokenizer."""
CHUNK = 64


@dataclass(frozen=True)
class Broken:
    """An image that is of no use, or a sample without any: where it lies, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """Some samples: a row of IMAGE for each image, a row of CAPTION for each caption, and why images are broken.

    A sample that cannot be read at all has one broken image.
    """

    images: npt.NDArray[np.void]
    captions: npt.NDArray[np.void]
    broken: tuple[Broken, ...]


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
        tuple(fault for part in parts for fault in part.broken),
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
        broken: list[Broken] = []
        for i, texts, document in self._read(samples):
            for text in texts:
                captions.append((i, text_hash(text), len(text), self._tokens(text)))
            if isinstance(document, BrokenImage):
                broken.append(Broken(self.source.name(i), str(document)))
                images.append((i, 0, 0, 0, 0, 0, -1))
                continue
            for reason in document.meta.get("missing", ()):
                broken.append(Broken(self.source.name(i), reason))
                images.append((i, 0, 0, 0, 0, 0, -1))
            label = document.meta.get("label", -1)
            for data in document.images:
                try:
                    images.append((i, _hash(data), len(data), *_looks(data), label))
                except BrokenImage as error:
                    broken.append(Broken(self.source.name(i), str(error)))
                    images.append((i, _hash(data), len(data), 0, 0, 0, label))
        return Measured(np.array(images, IMAGE), np.array(captions, CAPTION), tuple(broken))

    def _tokens(self, text: str) -> int:
        return self.tokenizer.count(text) - 2 if self.tokenizer else 0

    def _read(self, samples: Sequence[int]) -> Iterator[tuple[int, list[str], Document | BrokenImage]]:
        """Yield every sample with its texts and its document; many are on their way at once where reading is slow."""
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map if self.source.is_remote else map
            yield from zip(samples, read(self.source.texts, samples), read(self._document, samples), strict=True)

    def _document(self, i: int) -> Document | BrokenImage:
        try:
            return self.source.document(i, key(0, i))
        except BrokenImage as error:
            return error


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
