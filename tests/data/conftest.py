"""Tiny pictures and tar shards, made as img2dataset leaves them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Picture = Callable[..., bytes]
WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
WriteShards = Callable[..., Path]


def _picture(seed: int = 0, size: tuple[int, int] = (20, 16), file_format: str = "PNG", **options: Any) -> bytes:
    """Return a smooth random RGB picture of `size` (width, height) in `file_format`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, file_format, **options)
    return buffer.getvalue()


def _write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _write_shards(
    folder: Path, samples: int = 10, per_shard: int = 4, replaced: Mapping[int, bytes] | None = None
) -> Path:
    """Write `samples` pairs; `replaced` gives other image bytes for some of them."""
    for start in range(0, samples, per_shard):
        members: dict[str, bytes] = {}
        for i in range(start, min(start + per_shard, samples)):
            fields = {"title": f"title {i}", "tags": ["red", f"tag{i}"], "class": ["cat", "dog", "ant"][i % 3]}
            members[f"{i:05d}.png"] = (replaced or {}).get(i, _picture(i))
            members[f"{i:05d}.txt"] = f"a picture of thing {i}".encode()
            members[f"{i:05d}.json"] = json.dumps(fields).encode()
        _write_tar(folder / f"{start // per_shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(seed, size, file_format, **save options) -> encoded bytes."""
    return _picture


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    """write_tar(path, {member: bytes}) -> path."""
    return _write_tar


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """write_shards(folder, samples, per_shard, replaced) -> folder."""
    return _write_shards
