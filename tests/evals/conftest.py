"""Tiny WebDataset tars, and views whose features are known."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from altsight.data.prepare import read_pairs
from altsight.evals.base import Preprocess, Split, Task, View
from altsight.nn.encoder import Encoder
from altsight.nn.text import TextEncoder

SIZE = 8
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "grey": (120, 120, 120)}


@dataclass(frozen=True)
class Sample:
    """One image of a single colour (None: bytes that are no image), with a label and the text part."""

    colour: tuple[int, int, int] | None
    label: str | None = None
    text: str = ""


MakeSplit = Callable[[str, Sequence[Sample]], Split]


@pytest.fixture
def make_split(tmp_path: Path) -> MakeSplit:
    """Write samples to a tar and return them as a split."""

    def make(name: str, samples: Sequence[Sample]) -> Split:
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for i, sample in enumerate(samples):
                parts = {"png": _png(sample.colour), "json": json.dumps({"kind": sample.label}).encode()}
                if sample.text:
                    parts["txt"] = sample.text.encode()
                for suffix, data in parts.items():
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return Split(name, read_pairs(str(path)))

    return make


def _png(colour: tuple[int, int, int] | None) -> bytes:
    if colour is None:
        return b"no image at all"
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def near(name: str, i: int) -> tuple[int, int, int]:
    """Return the i-th variation of a named colour."""
    r, g, b = COLOURS[name]
    return (r + i % 5, g + i // 5 % 5, b + i // 25 % 5)


def coloured(count: int, offset: int = 0, names: Sequence[str] = ("red", "green", "blue")) -> list[Sample]:
    """Return `count` samples of each colour, whose label and caption is the colour's name."""
    return [Sample(near(name, offset + i), name, f"{name} thing") for i in range(count) for name in names]


@pytest.fixture
def colours(make_split: MakeSplit) -> Task:
    """Classify and describe images by colour."""
    splits = [make_split(name, coloured(8, 20 * i)) for i, name in enumerate(("train", "val", "test"))]
    return Task("colours", *splits, label="kind", prompts=("{}", "{} thing"))


class ColourEncoder(nn.Module):
    """Features are the mean colour of the image, centred; counts how many images it has encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.encoded = 0

    def normalize(self, images: Tensor) -> Tensor:
        return images.float() / 255 - 0.5

    def forward(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return self.gain * images.mean(dim=(2, 3))

    def point(self, encoded: Tensor, name: str) -> Tensor:
        return encoded


class WordTokenizer:
    """Ids are places in the list of colours; a text without a colour is grey."""

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        names = list(COLOURS)
        found = [[i for i, name in enumerate(names) if name in text] for text in texts]
        return torch.tensor([[ids[0] if ids else names.index("grey")] for ids in found])


class ColourTower(nn.Module):
    """Maps a colour's name to the features that its images have."""

    context = 4
    tokenizer = WordTokenizer()

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer.encode_all(texts, self.context)

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.tensor(list(COLOURS.values())).float() / 255 - 0.5
        return table[ids[:, 0]]


def make_view(encoder: nn.Module | None = None, dual: bool = False, batch_size: int = 4, **fields: Any) -> View:
    """Return a view on the colour encoder, or on another one."""
    if dual:
        fields.setdefault("embed_image", lambda features: features)
    return View(
        "colour",
        cast(Encoder, encoder or ColourEncoder()),
        Preprocess(SIZE, "half"),
        text=cast(TextEncoder, ColourTower()) if dual else None,
        batch_size=batch_size,
        **fields,
    )
