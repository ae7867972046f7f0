"""MUST: improve a zero-shot classifier on images without labels (Li et al. 2022; specification 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.listing import read_classes
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.sources import Source
from altsight.evals.base import Result, Split, View
from altsight.evals.bootstrap import class_interval, scored
from altsight.evals.features import content_hash, extract, joint_vectors, labels_of, left_out
from altsight.evals.zeroshot import classifier
from altsight.transfer.base import (
    FitConfig,
    ImageTower,
    fit,
    keep_encoder,
    known_by,
    need_text,
    prepared_for,
    with_view,
)
from altsight.transfer.must import MUST, MUSTConfig


@dataclass(frozen=True)
class SelfTrain:
    """Self-train the image tower of a dual encoder and its zero-shot classifier; labels serve the test alone."""

    data: str
    """Images to learn from, in any layout; their labels are not read."""
    test: str = ""
    """Labelled images to measure on, before and after; empty: nothing is measured."""
    label: str = "label"
    """Field with the class of a test image; in a folder with a folder for each class it is "label"."""
    classes: str = ""
    """File with a class on every line (or JSON, class -> name); empty: the classes of the test images."""
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    """Templates with one {} for the class name."""
    must: MUSTConfig = field(default_factory=MUSTConfig)
    optim: OptimConfig = MUST.optim
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=30, batch=1024))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return top-1, mean per class and the share of classes in use, before and after; for the teacher too.

        Raises:
            UserError: the view has no text tower, the images, names or labels cannot be used, or masks do not fit.
        """
        need_text(view, "self-training")
        self._check()
        images = replace(read_pairs(locate(self.data), ()), label="", classes=())
        test = Split("test", read_pairs(locate(self.test), (), self.label)) if self.test else None
        names = self._names(test)
        digest = content_hash(sorted(images.parts().items()))
        method = self_train(view, images, tuple(names.values()), self, digest, out)
        keep_encoder(view, method.encoder, out)
        if test is None:
            return []
        trained = [(view, classifier(view, tuple(names.values()), self.prompts)), *classifiers(method, view)]
        stages = ("zeroshot", "selftrain", "selftrain teacher")
        return [
            result
            for stage, (seen, weights) in zip(stages, trained, strict=True)
            for result in measure(seen, weights, tuple(names), test, self, stage)
        ]

    def _check(self) -> None:
        c = self.must
        shares = (c.threshold, *c.ema, *c.crop)
        if not all(0 <= share <= 1 for share in shares) or not 0 < c.crop[0] <= c.crop[1]:
            raise UserError("thresholds, EMAs and crops are shares: mend --must.threshold, --must.ema or --must.crop.")
        if c.scale <= 0 or c.warm_steps < 0 or not 0 <= c.magnitude <= 10:
            raise UserError(
                "cosines are scaled by more than 0, steps are 0 or more, and a magnitude is 0 to 10: mend "
                "--must.scale, --must.warm-steps or --must.magnitude."
            )

    def _names(self, test: Split | None) -> Mapping[str, str]:
        """Return class -> the name that stands in the prompts."""
        found = set() if test is None else set(labels_of(test, self.label)) - {""}
        if not self.classes:
            if not found:
                raise UserError("self-training needs the names of the classes: give --classes FILE or --test IMAGES.")
            return {name: name for name in sorted(found)}
        names = {label: synonyms[0] for label, synonyms in read_classes(Path(self.classes)).items()}
        if unknown := sorted(found - set(names)):
            raise UserError(f"'{self.classes}' lacks the class '{unknown[0]}' of the images in '{self.test}': add it.")
        return names


def self_train(view: View, images: Source, names: Sequence[str], settings: SelfTrain, digest: str, out: Path) -> MUST:
    """Return MUST trained on `images` for the classes `names`, into the folder `out`; see `fit` for the errors."""

    def make() -> MUST:
        method = MUST(settings.must, view, classifier(view, names, settings.prompts))
        method.init_weights(key(settings.fit.seed, 0, "init"))
        return method

    data = prepared_for(images, Path(settings.data), digest)
    identity = known_by(view.encoder, settings, names, test="", label="", classes="")
    return cast(MUST, fit("selftrain", make, identity, settings.optim, settings.fit, data, out))


def classifiers(method: MUST, view: View) -> list[tuple[View, Tensor]]:
    """Return what was learned from `view`, as views with their class weights (C, E): the student, then the teacher."""
    found = []
    for tower, head in ((method.tower, method.classifier), (method.teacher["tower"], method.teacher["classifier"])):
        assert isinstance(tower, ImageTower) and isinstance(head, nn.Linear)
        seen = with_view(view, tower.encoder, embed_image=tower.embed_image, project=None)
        found.append((seen, head.weight.detach().float().cpu()))
    return found


def measure(
    view: View, weights: Tensor, names: Sequence[str], test: Split, settings: SelfTrain, stage: str
) -> list[Result]:
    """Return top-1, its mean over classes and the share of classes in use of `weights` (C, E) on the test images."""
    extracted, labels = extract(view, test), labels_of(test, settings.label)
    rows = [row for row, sample in enumerate(extracted.kept) if labels[sample]]
    truth = torch.tensor([names.index(labels[extracted.kept[row]]) for row in rows])
    found = (joint_vectors(view, test)[rows] @ weights.T).argmax(dim=1)
    used = len(found.unique())
    top1 = scored(
        view,
        found == truth,
        task=settings.test,
        evaluator=stage,
        metric="top1",
        chance=1 / len(names),
        feature_point=f"{view.feature_point}, projected",
        data=content_hash((extracted.digests[row], int(label)) for row, label in zip(rows, truth, strict=True)),
        note=left_out(test, {"a broken image": extracted.broken, "no label": len(extracted.kept) - len(rows)}),
        extra={"seed": settings.fit.seed, "classes": len(names), "prompts": list(settings.prompts)},
    )
    plain = {name: value for name, value in top1.extra.items() if name != "hits"}
    mean = class_interval(found == truth, truth)
    in_use = replace(top1, metric="classes_in_use", value=used / len(names), low=None, high=None, chance=None)
    return [
        top1,
        replace(top1, metric="mean_class", value=mean.value, low=mean.low, high=mean.high, extra=plain),
        replace(in_use, note=f"{used} of {len(names)} classes are ever answered", extra=plain),
    ]
