"""`altsight codebook`: words of pixels for BEiT and SplitMask, made of the patches of a prepared data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Document, Example
from altsight.data.folder import writing
from altsight.data.loader import Loader
from altsight.data.prepared import Prepared
from altsight.data.survey import Progress, silent
from altsight.data.views import Crop
from altsight.nn.codebook import Kind, cut, nearest, save_codebook, train_codebook, usage

BATCH = 64
PER_IMAGE = 30
"""Patches of an image that k-means sees."""
CHECKED = 4 * BATCH
"""Images that are looked at afterwards, to see how the words are used."""


@dataclass(frozen=True)
class CodebookConfig:
    """Which words, and of what they are made."""

    vocabulary: int = 8192
    patch_size: int = 16
    kind: Kind = "kmeans"
    """kmeans: centres of mini-batch k-means over 30 patches of every image; patches: one patch each of as many images
    as there are words."""
    zero_mean: bool = False
    """Take the mean off every patch, so that brightness does not matter: where one word stands for most of them."""
    samples: int = 100_000
    """Images that are looked at, at most all; the paper's k-means sees 3 M patches."""
    img_size: int = 224
    """Side of the crops: that of the encoder's input."""
    crop: Crop = field(default_factory=Crop)
    seed: int = 0
    workers: int = 1
    """Processes that decode."""


@dataclass(frozen=True)
class CodebookPrepare:
    """Document -> image: uint8 (3, size, size). None without an image."""

    crop: Crop
    size: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        return {"image": self.crop(document.images[0], self.size, at)} if document.images else None


def make_codebook(
    prepared: Prepared, out: Path, config: CodebookConfig | None = None, progress: Progress = silent
) -> dict[str, float]:
    """Train a codebook on `prepared` and write it to the file `out`, for `--method.tokenizer.path`.

    The same data, configuration and seed give the same codebook.

    Returns:
        top_word: the share of the commonest word among the patches of images that come next in the order (a share
        above one half makes a poor target); word_bits: the entropy of all in bits.

    Raises:
        UserError: the images are too small or too few, or `out` cannot be written.
    """
    config = CodebookConfig() if config is None else config
    if out.suffix != ".safetensors":
        raise UserError(f"a codebook is a .safetensors file, and '{out}' is not named so: give another --out.")
    if config.vocabulary < 2 or not 0 < config.patch_size <= config.img_size:
        raise UserError(
            f"{config.vocabulary} words of {config.patch_size} x {config.patch_size} pixels cannot be made of images "
            f"of {config.img_size} x {config.img_size}: change --vocabulary, --patch-size or --img-size."
        )
    wanted = min(config.samples, len(prepared.source))
    per_image = PER_IMAGE
    if config.kind == "patches":
        wanted = min(wanted, config.vocabulary)
        per_image = -(-config.vocabulary // wanted)
    images = _images(prepared, config, wanted + CHECKED)
    seen = _counted(itertools.islice(images, wanted), wanted, progress)
    at = key(config.seed, 0, "codebook")
    words = train_codebook(
        seen, config.vocabulary, config.patch_size, at, config.kind, config.zero_mean, per_image=per_image
    )
    progress("patches", wanted, wanted)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.part")
        save_codebook(words, part)
        part.replace(out)
    patches = torch.cat([cut(image[None], config.patch_size)[0] for image in images])
    share, bits = usage(nearest(patches, words), len(words)).tolist()
    return {"top_word": share, "word_bits": bits}


def _images(prepared: Prepared, config: CodebookConfig, count: int) -> Iterator[Tensor]:
    """Yield the first `count` images in the order of `config.seed`, cropped: uint8 (3, size, size)."""
    prepare = CodebookPrepare(config.crop, config.img_size)
    loader = Loader(prepared.source, prepared.source.order(config.seed), prepare, BATCH, config.workers)
    whole = -(-count // BATCH) * BATCH
    batches = (batch["image"] for batch, _ in loader.batches(World(), 0, whole))
    yield from itertools.islice(itertools.chain.from_iterable(batches), count)


def _counted(images: Iterator[Tensor], count: int, progress: Progress) -> Iterator[Tensor]:
    for number, image in enumerate(images):
        progress("patches", number, count)
        yield image
