"""Detection and instance segmentation: fine-tune any encoder in Mask R-CNN, and score it as COCO does."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from altsight.core.config import OptimConfig, write_json
from altsight.core.dist import gather_objects, world
from altsight.core.errors import UserError
from altsight.core.rng import key, torch_seeded
from altsight.data.coco import CocoImages, mask_api, open_coco
from altsight.data.decode import BrokenImage, open_picture
from altsight.evals.base import Result, View
from altsight.evals.bootstrap import LEVEL
from altsight.evals.features import content_hash
from altsight.nn.encoder import Encoder
from altsight.nn.resample import resized
from altsight.train.log import progress_bar
from altsight.transfer.base import FitConfig, fit, keep_encoder, known_by, prepared_for
from altsight.transfer.detector import Detections, Detector, DetectorConfig

Kind = Literal["bbox", "segm"]
KINDS: dict[Kind, str] = {"bbox": "box", "segm": "mask"}
"""pycocotools' name of what is compared -> ours."""
METRICS: dict[str, tuple[int | slice, int]] = {
    "ap": (slice(None), 0),
    "ap50": (0, 0),
    "ap75": (5, 0),
    "ap_small": (slice(None), 1),
    "ap_medium": (slice(None), 2),
    "ap_large": (slice(None), 3),
}
"""Ours -> which of pycocotools' overlaps (0.5, 0.55, ... 0.95) and sizes (all, small, medium, large) are averaged. In
this order they are the first numbers that pycocotools sums up."""
RESAMPLES = 200
"""Of the test images, for the interval of AP."""
CHEAP = 100_000
"""Images times classes up to which there is an interval: a resample of COCO's takes pycocotools many seconds."""
CHUNK = 8
"""Images that are detected in at a time."""


@dataclass(frozen=True)
class Detect:
    """Fine-tune an encoder for detection and instance segmentation, and score it on another split."""

    data: str
    """Folder in the layout of COCO: SPLIT/*.jpg and annotations/instances_SPLIT.json."""
    train: str = "train2017"
    """Split to learn from."""
    test: str = "val2017"
    """Split to score on."""
    size: int = 1024
    """Side of the input in pixels; longer sides of images are resized to it, and in training to the jitter's shares."""
    drop_path: float = 0.1
    frozen: bool = False
    """Train the pyramid and the heads only."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    optim: OptimConfig = Detector.optim
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch=64))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return AP of boxes, and of masks, as COCO defines it; predictions.json gets what was found.

        Raises:
            UserError: the data are missing or damaged, or the encoder cannot take the size.
        """
        mask_api()
        train, test = (open_coco(Path(self.data), split) for split in (self.train, self.test))
        self._check(train, test)
        method = self._fit(view, train, out)
        keep_encoder(view, method.encoder, out)
        found = predict(method, test)
        if world().is_main:
            write_json(out / "predictions.json", found)
        preprocess = replace(view.preprocess, size=self.size, crop_ratio=1.0).hash()
        kinds: tuple[Kind, ...] = ("bbox", "segm") if self.detector.masks else ("bbox",)
        return [result for kind in kinds for result in score(test, found, kind, self, preprocess)]

    def _check(self, train: CocoImages, test: CocoImages) -> None:
        c = self.detector
        if not 0 < c.jitter[0] <= c.jitter[1] or min(c.width, c.hidden, c.most, c.proposals, c.sampled) < 1:
            raise UserError("--detector.jitter takes two sizes above 0, the smaller one first; numbers are 1 or more.")
        if train.category_ids != test.category_ids or train.classes != test.classes:
            raise UserError(f"the splits '{self.train}' and '{self.test}' of '{self.data}' list different categories.")
        for split in (train, test):
            if self.detector.masks and not split.has_masks:
                raise UserError(f"'{split.annotations}' has objects without a mask: set --detector.no-masks.")
        if not any(train.instances):
            raise UserError(f"'{train.annotations}' has no object to learn from.")

    def _fit(self, view: View, train: CocoImages, out: Path) -> Detector:
        encoder = sized(view.encoder, self.size, 0.0 if self.frozen else self.drop_path)

        def make() -> Detector:
            with torch_seeded(key(self.fit.seed, 0, "init")):
                return Detector(self.detector, encoder, len(train.classes), self.frozen)

        data = prepared_for(train, Path(self.data), digest(train))
        identity = known_by(view.encoder, self, train.classes, test="")
        return cast(Detector, fit("detect", make, identity, self.optim, self.fit, data, out))


def sized(encoder: Encoder, size: int, drop_path: float) -> Encoder:
    """Return a copy of `encoder` for images of `size` pixels, whose maps have strides of powers of two.

    torchvision pools regions at no other scales. So patches of 14 pixels are resampled to 16.

    Raises:
        UserError: the coarsest map has no whole number of rows.
    """
    changes: dict[str, Any] = {"img_size": size, "drop_path": drop_path}
    if encoder.is_vit:
        patch = 2 ** round(math.log2(encoder.patch_size))
        stride = 2 * patch
        if patch != encoder.patch_size:
            changes["patch_size"] = patch
    else:
        stride = int(encoder.backbone.feature_info[-1]["reduction"])
    if size < 1 or size % stride:
        near = max(size // stride, 1) * stride
        raise UserError(
            f"the size {size} is not divisible by {stride}, the stride of the pyramid's coarsest map: set --size "
            f"{near} or {near + stride}."
        )
    return resized(encoder, **changes)


def digest(images: CocoImages) -> str:
    """Return 12 hex digits over the names of images and their objects."""
    rows = zip(images.pictures, images.instances, strict=True)
    return content_hash((p.id, p.file.name, [(t.label, t.box) for t in things]) for p, things in rows)


def predict(method: Detector, images: CocoImages) -> list[dict[str, Any]]:
    """Return what is found in every image, in COCO's format of results; the images are shared out among the ranks.

    Raises:
        UserError: an image cannot be read, or has another size than its annotations.
    """
    mine = range(world().rank, len(images), world().size)
    found: list[dict[str, Any]] = []
    method.eval()
    with progress_bar(transient=True) as bar:
        task = bar.add_task("detecting", total=len(mine), note="")
        for start in range(0, len(mine), CHUNK):
            part = mine[start : start + CHUNK]
            for i, detections in zip(part, method.detect([_read(images, i) for i in part]), strict=True):
                found += as_results(detections, images.pictures[i].id, images.category_ids)
            bar.advance(task, len(part))
    whole = [row for rows in gather_objects(found) for row in rows]
    return sorted(whole, key=lambda row: int(row["image_id"]))


def _read(images: CocoImages, i: int) -> bytes:
    noted, name = images.pictures[i], images.name(i)
    try:
        data = images.image(i)
        picture = open_picture(data)
    except BrokenImage as error:
        raise UserError(f"the test image '{name}' cannot be read ({error}): mend it, or take it out.") from None
    if (picture.height, picture.width) != (noted.height, noted.width):
        raise UserError(
            f"the test image '{name}' has {picture.height} x {picture.width} pixels, and is annotated as "
            f"{noted.height} x {noted.width}: mend the annotations."
        )
    return data


def as_results(detections: Detections, image: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the detections in an image in COCO's format: boxes as left, top, width, height, masks as run lengths."""
    boxes, masks = detections["boxes"].double().cpu(), detections.get("masks")
    boxes[:, 2:] -= boxes[:, :2]
    rows = []
    for n, (box, label, score) in enumerate(
        zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    ):
        rows.append({"image_id": image, "category_id": category_ids[label - 1], "bbox": box, "score": score})
        if masks is not None:
            coded = mask_api().encode(np.asfortranarray((masks[n, 0] >= 0.5).byte().cpu().numpy()))
            rows[n]["segmentation"] = {"size": coded["size"], "counts": coded["counts"].decode()}
    return rows


def score(
    images: CocoImages, found: list[dict[str, Any]], kind: Kind, settings: Detect, preprocess: str
) -> list[Result]:
    """Return COCO's AP of boxes or masks, with an interval over images where that is cheap."""
    judged = evaluate(images.annotations, found, kind)
    cheap = len(images) * len(images.classes) <= CHEAP
    intervals = resampled(judged, settings.fit.seed) if cheap and found else {}
    results = []
    for name, value in zip(METRICS, map(float, judged.stats), strict=False):
        low, high = intervals.get(name, (None, None)) if value >= 0 else (None, None)
        absent = "not applicable: no object of this size"
        results.append(
            Result(
                task=settings.data,
                evaluator="detect",
                metric=f"{KINDS[kind]}_{name}",
                # pycocotools says -1 where the set has no object of that size.
                value=value if value >= 0 else None,
                low=low,
                high=high,
                n=len(images),
                split=settings.test,
                feature_point="pyramid of the last map",
                preprocess=preprocess,
                data=digest(images),
                note=absent if value < 0 else "" if intervals else "no interval: too many images, or nothing found",
                extra={"seed": settings.fit.seed, "classes": len(images.classes), "resamples": RESAMPLES},
            )
        )
    return results


def evaluate(annotations: Path, found: list[dict[str, Any]], kind: Kind) -> Any:
    """Return pycocotools' COCOeval of results on an annotation file, summed up; `stats` are its twelve numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        if not found:  # which pycocotools cannot load
            answers = COCO()
            answers.dataset = {**truth.dataset, "annotations": []}
            answers.createIndex()
        else:
            # It writes into what it is given.
            answers = truth.loadRes([dict(row) for row in found])
        judged = COCOeval(truth, answers, kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged


def resampled(judged: Any, seed: int) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile intervals over resamples of the images, from what `evaluate` returned.

    Each image's matches are kept, and put together anew as often as the image was drawn.
    """
    from pycocotools.cocoeval import COCOeval

    ids, areas = judged.params.imgIds, len(judged.params.areaRng)
    # One entry for every category, size range and image.
    matches = np.array(judged.evalImgs, dtype=object).reshape(-1, areas, len(ids))
    again = COCOeval()
    again.params = copy.copy(judged.params)
    again.params.maxDets = judged.params.maxDets[-1:]
    draw = key(seed, 0, "bootstrap").generator()
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(RESAMPLES):
        chosen = draw.integers(len(ids), size=len(ids))
        again.params.imgIds = [ids[i] for i in chosen]
        again._paramsEval, again.evalImgs = again.params, list(matches[:, :, chosen].reshape(-1))
        with contextlib.redirect_stdout(io.StringIO()):
            again.accumulate()
        for name, found in values.items():
            found.append(average_precision(again.eval["precision"], name))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # A resample without an object of a size has no value for it.
    seen = {name: [value for value in found if value >= 0] for name, found in values.items()}
    quantiles = {name: np.quantile(found, tails) for name, found in seen.items() if found}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def average_precision(precision: npt.NDArray[np.float64], metric: str = "ap") -> float:
    """Return the mean of pycocotools' precisions (overlap, recall, class, size, most), without classes that have none.

    -1 where no class has any, as pycocotools says it.
    """
    overlap, size = METRICS[metric]
    valid = precision[overlap, ..., size, -1]
    valid = valid[valid > -1]
    return float(valid.mean()) if valid.size else -1.0
