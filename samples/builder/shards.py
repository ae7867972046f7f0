"""Write samples as WebDataset tar shards, the same bytes on every run."""

import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .split import SPLITS, content_hash

SHARD_SIZE = 1000


@dataclass(frozen=True)
class Sample:
    """A picture, its text, and the fields of its json file."""

    picture: Image.Image
    text: str
    fields: Mapping[str, Any]


def write(samples: Sequence[Sample], splits: Sequence[str], folder: Path, quality: int) -> None:
    """Write `folder/SPLIT/00000.tar ...`, samples in the order of their content hash."""
    shutil.rmtree(folder, ignore_errors=True)
    ordered = sorted(zip(samples, splits, strict=True), key=lambda pair: (content_hash(pair[0].picture), pair[0].text))
    for split in SPLITS:
        chosen = [sample for sample, its_split in ordered if its_split == split]
        (folder / split).mkdir(parents=True)
        for shard, start in enumerate(range(0, len(chosen), SHARD_SIZE)):
            with tarfile.open(folder / split / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for index, sample in enumerate(chosen[start : start + SHARD_SIZE]):
                    _add(archive, f"{shard:05d}{index:04d}", sample, quality)


def compact_json(value: Any) -> str:
    """JSON without spaces and without escapes: a small file is one tar block."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _add(archive: tarfile.TarFile, key: str, sample: Sample, quality: int) -> None:
    image = io.BytesIO()
    sample.picture.save(image, "webp", quality=quality, method=6)
    size = {"width": sample.picture.width, "height": sample.picture.height}
    members = {
        "json": compact_json({"key": key, **sample.fields, **size}).encode(),
        "txt": sample.text.encode(),
        "webp": image.getvalue(),
    }
    for extension, data in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
