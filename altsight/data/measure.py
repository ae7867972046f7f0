"""Every sample of a data set, decoded and read once: what `altsight check` counts from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from altsight.core.errors import UserError
from altsight.data.decode import BrokenImage, decode
from altsight.data.sources import Pairs
from altsight.data.survey import Progress
from altsight.data.text import Tokenizer

IMAGE = np.dtype([("content", "<u8"), ("looks", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4")])
"""One image: hash of its bytes, difference hash of its pixels, size (0 where it is broken), class (-1: none)."""
CAPTION = np.dtype([("sample", "<i8"), ("content", "<u8"), ("characters", "<u4"), ("tokens", "<u4")])
"""One caption: the sample it belongs to, hash of its text, length."""
CHUNK = 64


@dataclass(frozen=True)
class Measured:
    """Some samples: one row of IMAGE each, one row of CAPTION for each caption, and why images are broken."""

    images: npt.NDArray[np.void]
    captions: npt.NDArray[np.void]
    broken: tuple[str, ...]


def measure(source: Pairs, tokenizer: Tokenizer | None, workers: int, progress: Progress) -> Measured:
    """Decode every image of `source` and read every caption, in `workers` processes (0: in this one).

    Raises:
        UserError: a shard cannot be read any more.
    """
    size = len(source)
    ranges = [range(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    chunks = DataLoader(_Chunks(source, tokenizer), batch_size=None, sampler=ranges, num_workers=workers)
    parts: list[Measured] = []
    for samples, part in zip(ranges, chunks, strict=True):
        if isinstance(part, UserError):
            raise part
        parts.append(part)
        progress("decoding images", samples.stop, size)
    return Measured(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.captions for part in parts]),
        tuple(name for part in parts for name in part.broken),
    )


@dataclass(frozen=True)
class _Chunks(Dataset[Measured | UserError]):
    """Map-style data set over ranges of samples."""

    source: Pairs
    tokenizer: Tokenizer | None

    def __getitem__(self, samples: range) -> Measured | UserError:
        # A UserError travels back as a value: raised here, DataLoader would bury it in a worker's traceback.
        try:
            return self._measure(samples)
        except UserError as error:
            return error

    def _measure(self, samples: range) -> Measured:
        images, captions, broken = np.zeros(len(samples), IMAGE), [], []
        for row, i in zip(images, samples, strict=True):
            values = self.source.values(i)
            for text in self.source.captions(values):
                captions.append((i, text_hash(text), len(text), self.tokenizer.count(text) if self.tokenizer else 0))
            name = self.source.class_name(values)
            row["label"] = self.source.classes.index(name) if name in self.source.classes else -1
            data = self.source.index.image(i)
            row["content"] = _hash(data)
            try:
                pixels = decode(data)
            except BrokenImage as error:
                broken.append(f"{self.source.index.name(i)} ({error})")
                continue
            row["looks"], row["height"], row["width"] = difference_hash(pixels), *pixels.shape[1:]
        return Measured(images, np.array(captions, CAPTION), tuple(broken))


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
