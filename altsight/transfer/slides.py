"""Zero-shot classification of gigapixel images: tiles are compared with class names, and their scores pooled.

MI-Zero (Lu et al. 2023, "Visual Language Pretrained Multiple Instance Zero-Shot Transfer for Histopathology Images";
specification 1). Nothing is trained.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from altsight.core import dist
from altsight.core.errors import UserError
from altsight.data.listing import Item, check_labels, list_items, read_classes
from altsight.data.slide import SUFFIXES, open_slide
from altsight.evals.base import Result, View
from altsight.evals.features import content_hash
from altsight.train.log import progress_bar
from altsight.transfer.base import need_text
from altsight.transfer.heatmap import draw_heatmap
from altsight.transfer.medians import METRICS, spreads
from altsight.transfer.pooling import neighbours, pooled
from altsight.transfer.prompt_sets import PromptBank, PromptSet, class_vectors, draw_bank, read_bank
from altsight.transfer.slide_features import Progress, SlideFeatures, TileConfig, slide_features, slide_name

Pooled = dict[str, Tensor]
"""Way of pooling -> scores of every set of prompts (sets, C)."""
SHOWN = 3
"""Classes in a heat map, the likeliest first."""


@dataclass(frozen=True)
class Slides:
    """Classify slides by the names of classes; without labels it tells what each one resembles most.

    Writes the vectors of the tiles (features/), the prompts (prompts.json), the scores of all prompts together
    (scores.csv) and heat maps.
    """

    data: Path
    """A slide, a folder of slides or of class folders of them, or a table (CSV, JSON lines) of path and label."""
    classes: Path
    """One class a line, other names for it after `|`; or JSON with class -> names."""
    templates: tuple[str, ...] = ("{}.", "a histopathological image showing {}.", "presence of {}.")
    """Sentences with `{}` for the name."""
    sets: int = 50
    """Sets of prompts that are drawn; the median over them is reported."""
    prompts: Path | None = None
    """prompts.json of another run, to ask in the same words."""
    topk: tuple[int, ...] = (1, 5, 50)
    """Best tiles of each class that are averaged."""
    neighbours: int = 8
    """Tiles over which scores are smoothed."""
    include_self: bool = True
    """A tile is one of its own neighbours."""
    tiles: TileConfig = field(default_factory=TileConfig)
    batch: int = 128
    """Tiles that are in memory at a time."""
    heatmaps: int = 20
    """Slides, from the first, of which a heat map is drawn."""
    seed: int = 0
    """Of the sets of prompts and of the intervals."""

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return the medians over sets of prompts, or for slides without labels what they resemble most.

        Raises:
            UserError: see `altsight.data.listing`, `altsight.data.slide` and `altsight.transfer.prompt_sets`; or the
                view has no text tower.
        """
        need_text(view, "zero-shot classification of slides")
        classes = read_classes(self.classes)
        items = list_items(self.data, is_slide, "slide")
        check_labels(items, list(classes), self.data)
        bank = self._bank(classes)
        self._check()
        together = PromptSet(tuple(dict.fromkeys(t for s in bank.sets for t in s.templates)), dict(classes))
        vectors = class_vectors(view, [*bank.sets, together], list(classes))
        found = self._pool(view, items, vectors, out)
        if dist.world().is_main:
            bank.save(out / "prompts.json")
            self._write_scores(items, list(classes), found, out)
            self._draw(view, items, list(classes), vectors[-1], found, out)
        dist.barrier()
        if any(item.label for item in items):
            return list(self._medians(view, items, list(classes), found))
        return list(self._answers(view, items, list(classes), found))

    def _check(self) -> None:
        if min(self.topk, default=0) < 1 or self.neighbours < 1:
            raise UserError("pooling and smoothing take 1 tile or more: mend --topk or --neighbours.")
        if self.batch < 1 or self.tiles.tile < 1 or self.tiles.magnification <= 0:
            raise UserError(
                "tiles need a size and a batch above 0: mend --batch, --tiles.tile or --tiles.magnification."
            )
        if self.tiles.stride < 0 or self.heatmaps < 0:
            raise UserError("neither strides nor numbers of pictures are below 0: mend --tiles.stride or --heatmaps.")

    def _bank(self, classes: dict[str, tuple[str, ...]]) -> PromptBank:
        if self.prompts is not None:
            return read_bank(self.prompts, list(classes))
        return draw_bank(self.templates, classes, self.sets, self.seed)

    def _pool(self, view: View, items: Sequence[Item], vectors: Tensor, out: Path) -> list[Pooled]:
        """Return the scores of every slide; the last set is all prompts together. Slides are dealt out to the ranks."""
        place, found = dist.start(view.device), dict[int, Pooled]()
        mine = range(place.rank, len(items), place.size)
        with progress_bar() as bar:
            task = bar.add_task("slides", total=len(mine), note="")

            def tell(done: int, tiles: int) -> None:
                bar.update(task, note=f"{done:,} of {tiles:,} tiles of this one")

            for number in mine:
                found[number] = self._scores(self._features(view, items[number], out, tell), vectors)
                bar.advance(task)
        everywhere = {number: scores for part in dist.gather_objects(found) for number, scores in part.items()}
        return [everywhere[number] for number in range(len(items))]

    def _features(self, view: View, item: Item, out: Path, *progress: Progress) -> SlideFeatures:
        return slide_features(view, item.path, self.tiles, self.batch, out / "features", *progress)

    def _scores(self, found: SlideFeatures, vectors: Tensor) -> Pooled:
        index = neighbours(found.coords, self.neighbours, self.include_self)
        each = [pooled(found.vectors @ matrix.T, index, self.topk) for matrix in vectors]
        return {way: torch.stack([scores[way] for scores in each]) for way in each[0]}

    def _medians(
        self, view: View, items: Sequence[Item], classes: Sequence[str], found: list[Pooled]
    ) -> Iterator[Result]:
        rows = [number for number, item in enumerate(items) if item.label]
        labels = np.array([classes.index(items[number].label) for number in rows])
        data = content_hash([items[n].path.name, os.stat(items[n].path).st_size, items[n].label] for n in rows)
        for way in found[0]:
            # Without the last set, in which all prompts are together.
            scores = torch.stack([found[number][way][:-1] for number in rows], dim=1)
            for metric, spread in spreads(scores, labels, view.logit_scale, self.seed).items():
                yield Result(
                    self.data.stem,
                    "slides",
                    f"{way} {metric}",
                    spread.median,
                    spread.low,
                    spread.high,
                    chance=0.5 if metric == METRICS[-1] else 1 / len(classes),
                    n=len(rows),
                    feature_point=f"{view.feature_point}, projected",
                    preprocess=view.preprocess.hash(),
                    data=data,
                    note=f"median over {len(scores)} sets of prompts",
                    extra={"seed": self.seed, "quartiles": spread.quartiles(), "values": list(spread.values)},
                )

    def _answers(
        self, view: View, items: Sequence[Item], classes: Sequence[str], found: list[Pooled]
    ) -> Iterator[Result]:
        for item, ways in zip(items, found, strict=True):
            for way, scores in ways.items():
                best = scores[-1].argsort(descending=True).tolist()
                yield Result(
                    item.path.stem,
                    "slides",
                    way,
                    float(scores[-1][best[0]]),
                    n=1,
                    feature_point=f"{view.feature_point}, projected",
                    preprocess=view.preprocess.hash(),
                    data=content_hash([[item.path.name, os.stat(item.path).st_size]]),
                    note="cosine of: " + ", ".join(f"{classes[i]} {scores[-1][i]:.3f}" for i in best[:SHOWN]),
                    extra={"seed": self.seed, "scores": dict(zip(classes, scores[-1].tolist(), strict=True))},
                )

    def _draw(
        self, view: View, items: Sequence[Item], classes: Sequence[str], matrix: Tensor, found: list[Pooled], out: Path
    ) -> None:
        way = f"top{self.topk[0]}"
        for item, ways in list(zip(items, found, strict=True))[: self.heatmaps]:
            tiles = self._features(view, item, out)
            best = ways[way][-1].argsort(descending=True)[:SHOWN].tolist()
            scores = {classes[i]: tiles.vectors @ matrix[i] for i in best}
            path = out / "heatmaps" / f"{slide_name(item.path)}.png"
            draw_heatmap(open_slide(item.path), tiles.coords, tiles.span, scores, path)

    def _write_scores(self, items: Sequence[Item], classes: Sequence[str], found: list[Pooled], out: Path) -> None:
        part = out / "scores.csv.part"
        with part.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "pooling", *classes])
            for item, ways in zip(items, found, strict=True):
                for way, scores in ways.items():
                    table.writerow([item.path, item.label, way, *(f"{s:.6f}" for s in scores[-1].tolist())])
        part.replace(out / "scores.csv")


def is_slide(path: Path) -> bool:
    """Return whether a path is a file that may be a slide, by its suffix."""
    return path.is_file() and path.suffix.lower() in SUFFIXES
