"""JPEG shards to batches: the field's pipelines and ours in one run: `pip install webdataset; python -m bench.loader`.

Three ways are measured in turns, round after round, on the same photographs and captions: webdataset with Pillow and
torchvision as OpenCLIP configures them, timm's loader on a folder of the files, and ours. The first two deliver
normalised floats, ours uint8 that is normalised on the device. All figures of one table are from one run; compare them
with each other, not with another machine's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import timm.data
import torch
import webdataset as wds
from PIL import Image, ImageEnhance
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms as T

from altsight.core.dist import World
from altsight.core.rng import Key, key
from altsight.core.types import Document, Example
from altsight.data.decode import open_picture
from altsight.data.loader import Loader
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import open_prepared
from altsight.data.views import NORMALIZATIONS, Crop

VIEW, BATCH, SHARD = 224, 16, 32
SCALES = ((0.9, 1.0), (0.08, 1.0))
RATIO = (3 / 4, 4 / 3)
ROUNDS, SECONDS, WARMUP = 3, 1.5, 3
MEAN, STD = NORMALIZATIONS["clip"]
CAPTION = "a photograph of a temple in China, or of a flower, in the light of the afternoon"


@dataclass(frozen=True)
class Kind:
    """A kind of photograph: width and height, how many of them, and the noise that gives the files their usual size."""

    size: tuple[int, int]
    count: int
    noise: float

    @property
    def name(self) -> str:
        """'500x375'."""
        return f"{self.size[0]}x{self.size[1]}"


KINDS = (Kind((500, 375), 256, 3.5), Kind((1500, 1000), 128, 1.3))

Row = dict[str, str | float | list[float]]
"""One line of a table: column -> what stands there."""

Batches = Generator[int, None, None]
"""The sizes of the batches of a pipeline, for ever."""


def spell(scale: tuple[float, float]) -> str:
    """Return '0.9-1'."""
    return f"{scale[0]:g}-{scale[1]:g}"


@cache
def photographs() -> list[Image.Image]:
    """Return the two photographs that come with scikit-learn."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photograph(kind: Kind, number: int) -> bytes:
    """Return the JPEG (quality 90) of a part of one of the photographs."""
    draw = np.random.default_rng(number)
    image = photographs()[number % 2]
    aspect = kind.size[0] / kind.size[1]
    width = min(image.width, image.height * aspect) * draw.uniform(0.5, 1)
    left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - width / aspect)
    box = (left, top, left + width, top + width / aspect)
    image = image.resize(kind.size, Image.Resampling.LANCZOS, box)
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(draw.uniform(0.8, 1.2))
    grain = draw.normal(0, kind.noise, (image.height, image.width, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(kind: Kind, folder: Path) -> list[bytes]:
    """Write the photographs of a kind as shards, prepared, and as files; return their bytes."""
    files = [photograph(kind, i) for i in range(kind.count)]
    (folder / "images" / "all").mkdir(parents=True)
    for i, data in enumerate(files):
        (folder / "images" / "all" / f"{i:05d}.jpg").write_bytes(data)
        with tarfile.open(folder / f"{i // SHARD:05d}.tar", "a") as tar:
            for suffix, content in (("jpg", data), ("txt", CAPTION.encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    prepare(PrepareConfig(str(folder / "*.tar"), folder / "prepared", vocab_size=300))
    return files


def tokens(text: str) -> Tensor:
    """Return the caption's bytes as 77 tokens: the same little work in every pipeline."""
    return torch.tensor(list(text.encode()[:77].ljust(77, b"\0")))


def open_clip(folder: Path, workers: int, scale: tuple[float, float]) -> Batches:
    """Run batches made as by open_clip's get_wds_dataset and image_transform."""
    crop = T.RandomResizedCrop(VIEW, scale, RATIO, T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, lambda image: image.convert("RGB"), T.ToTensor(), T.Normalize(MEAN, STD)])
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(sorted(map(str, folder.glob("*.tar")))),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(2 * SHARD, initial=SHARD),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=transform, text=tokens),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ).repeat()
    for images, _ in wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=workers):
        yield len(images)


def timm_loader(folder: Path, workers: int, scale: tuple[float, float]) -> Batches:
    """Run timm.data.create_loader on the folder of files."""
    dataset = timm.data.create_dataset("", str(folder / "images"), target_transform=lambda _: tokens(CAPTION))
    loader = timm.data.create_loader(
        dataset,
        (3, VIEW, VIEW),
        BATCH,
        is_training=True,
        scale=scale,
        ratio=RATIO,
        hflip=0,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=False,
    )
    for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield len(images)


@dataclass(frozen=True)
class Views:
    """The preparation of a method that wants one crop and the caption's tokens."""

    crop: Crop

    def __call__(self, document: Document, at: Key) -> Example:
        return {"image": self.crop(document.images[0], VIEW, at), "text": tokens(document.texts[0])}


def ours(folder: Path, workers: int, scale: tuple[float, float]) -> Batches:
    """Run the loader that every method trains with."""
    source = open_prepared(folder / "prepared").source
    loader = Loader(source, source.order(0), Views(Crop(scale, RATIO, flip=False)), BATCH, workers)
    for batch, _ in loader.batches(World(), 0, 10**12):
        yield len(batch)


PIPELINES: dict[str, Callable[[Path, int, tuple[float, float]], Batches]] = {
    "open_clip": open_clip,
    "timm": timm_loader,
    "ours": ours,
}


def images_per_second(batches: Batches, clock: Callable[[], float]) -> float:
    """Return the speed of a pipeline, its start left out."""
    for _ in range(WARMUP):
        next(batches)
    seen, start = 0, clock()
    while (elapsed := clock() - start) < SECONDS:
        seen += next(batches)
    return seen / elapsed


def first_batch(folder: Path) -> Row:
    """Return the seconds from the prepared folder to the first batch, in workers that have to be started."""
    start = time.perf_counter()
    with closing(ours(folder, os.cpu_count() or 1, SCALES[0])) as batches:
        next(batches)
        return {"seconds": time.perf_counter() - start}


def speeds(kind: Kind, folder: Path, scale: tuple[float, float], cores: int) -> Row:
    """Return the median speed of every pipeline: by this process's own time on one core, on several with workers."""
    clock = time.perf_counter if cores > 1 else time.process_time
    found: dict[str, list[float]] = {name: [] for name in PIPELINES}
    for _ in range(ROUNDS):
        for name, pipeline in PIPELINES.items():
            with closing(pipeline(folder, cores if cores > 1 else 0, scale)) as batches:
                found[name].append(images_per_second(batches, clock))
    median = {name: statistics.median(values) for name, values in found.items()}
    ratios = {f"/ {name}": median["ours"] / median[name] for name in PIPELINES if name != "ours"}
    return {"pictures": kind.name, "scale": spell(scale), "cores": float(cores), **median, **ratios}


def differences(kind: Kind, files: list[bytes], scale: tuple[float, float]) -> list[Row]:
    """Compare our views with Pillow's full decode and bicubic resize, of the box as drawn and as moved to the grid."""
    crop = Crop(scale, RATIO, flip=False)
    errors: dict[str, list[np.ndarray]] = {"as drawn": [], "as moved": []}
    for i, data in enumerate(files):
        picture, image = open_picture(data), Image.open(io.BytesIO(data))
        top, left, height, width = crop.box(picture.height, picture.width, key(0, i))
        r = picture.reduction(min(height, width) / VIEW)
        drawn = np.array([left, top, left + width, top + height])
        moved = np.minimum(r * ((drawn + r // 2) // r), image.size * 2)
        view = crop(data, VIEW, key(0, i)).permute(1, 2, 0).numpy().astype(float)
        for name, box in (("as drawn", drawn), ("as moved", moved)):
            theirs = image.crop(tuple(box.tolist())).resize((VIEW, VIEW), Image.Resampling.BICUBIC)
            errors[name].append(view - np.asarray(theirs))
    rows: list[Row] = []
    for name, of in errors.items():
        mean, largest, square = np.abs(of).mean(), np.abs(of).max(), np.square(of).mean()
        row = {"mean": float(mean), "largest": float(largest), "PSNR": float(10 * np.log10(255**2 / square))}
        rows.append({"pictures": kind.name, "scale": spell(scale), "box": name, **row})
    return rows


def agreement(scale: tuple[float, float], draws: int = 10_000) -> list[Row]:
    """Compare our boxes in a picture of 500 x 375 pixels with torchvision's; p is Kolmogorov-Smirnov's."""
    image, crop = torch.empty(3, 375, 500), Crop(scale, RATIO)
    torch.manual_seed(0)
    us = [crop.box(375, 500, key(0, i)) for i in range(draws)]
    them = [T.RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(draws)]
    boxes = {"ours": np.array(us), "torchvision": np.array(them)}
    rows: list[Row] = []
    for what in ("area", "aspect", "top", "left"):
        values = {}
        for name, (top, left, height, width) in ((name, b.T) for name, b in boxes.items()):
            values[name] = {"area": height * width / 187_500, "aspect": width / height, "top": top, "left": left}[what]
        row: Row = {"scale": spell(scale), "what": what, "p": float(stats.ks_2samp(*values.values()).pvalue)}
        for name, of in values.items():
            row[f"{name}: mean; 5, 50, 95 %"] = [float(of.mean()), *np.quantile(of, (0.05, 0.5, 0.95)).tolist()]
        rows.append(row)
    return rows


def entry(value: str | float | list[float]) -> str:
    """Return what a table shows of a value."""
    if isinstance(value, list):
        return ", ".join(f"{number:.3g}" for number in value)
    return value if isinstance(value, str) else f"{value:.3g}"


def main(path: Path | None) -> None:
    """Print the tables, and write their rows to `path` as JSON."""
    torch.set_num_threads(1)
    speed: list[Row] = []
    difference: list[Row] = []
    started: list[Row] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            files = write(kind, Path(name))
            print(f"{kind.count} photographs of {kind.name}, {statistics.mean(map(len, files)) / 1000:.0f} KB each")
            started.append({"pictures": kind.name, **first_batch(Path(name))})
            for scale in SCALES:
                speed += [speeds(kind, Path(name), scale, cores) for cores in sorted({1, os.cpu_count() or 1})]
                difference += differences(kind, files, scale)
    boxes = [row for scale in SCALES for row in agreement(scale)]
    tables = {
        "images per second": speed,
        "grey levels between ours and Pillow's": difference,
        "boxes": boxes,
        "first batch": started,
    }
    for title, rows in tables.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*map(entry, row.values()))
        Console().print(table)
    if path is not None:
        path.write_text(json.dumps({"torch": torch.__version__, **tables}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows of the tables to this file")
    main(parser.parse_args().json)
