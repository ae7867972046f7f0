"""MUST on a target that looks different: fairness keeps all classes in use and is worth points (specification 5.6)."""

from __future__ import annotations

import dataclasses
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import PIL.Image
import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.shapes import CLASSES, Shapes
from altsight.data.sources import Pairs
from altsight.data.views import Crop
from altsight.evals.base import Split
from altsight.evals.bootstrap import hits_of, paired_difference
from altsight.evals.zeroshot import classifier
from altsight.losses.pixels import patchify
from altsight.train.log import read_log
from altsight.transfer.base import FitConfig
from altsight.transfer.must import MUST, MUSTConfig
from altsight.transfer.selftrain import SelfTrain, classifiers, measure, self_train
from tests.toy import PROMPT, toy_clip

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
# Scale, threshold, rate and epochs of the specification's own trial; colours tell classes here, so none is changed.
CONFIG = MUSTConfig(
    mask_ratio=0.0,
    mask_block=8,
    scale=30.0,
    ema=(0.99, 0.9998),
    warm_steps=100,
    magnitude=0,
    flip=False,
    crop=(0.6, 1.0),
)


@dataclass(frozen=True)
class Shifted(Shapes):
    """Shapes at 0.7 of their contrast, with noise: half of them are recognised, where it was two thirds."""

    def image(self, i: int) -> bytes:
        return shifted(super().image(i), self.seed, i)


@functools.lru_cache(maxsize=2**14)
def shifted(image: bytes, seed: int, i: int) -> bytes:
    picture = np.asarray(PIL.Image.open(io.BytesIO(image))).astype(float)
    noise = key(seed, i, "shift").generator().normal(0, 15, picture.shape)
    file = io.BytesIO()
    PIL.Image.fromarray((128 + 0.7 * (picture - 128) + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


TARGET = Split("test", cast(Pairs, Shifted(1000, 3000)))


def settings(config: MUSTConfig, seed: int, lr: float = 1e-4) -> SelfTrain:
    how = FitConfig(epochs=8, batch=100, workers=0, precision="fp32", device="cpu", seed=seed)
    optim = dataclasses.replace(MUST.optim, lr=lr, lr_base_batch=0, min_lr=0.0)
    return SelfTrain("shifted shapes", prompts=(PROMPT,), must=config, optim=optim, fit=how)


def train(chosen: SelfTrain, out: Path) -> MUST:
    seed = chosen.fit.seed
    return self_train(toy_clip(), Shifted(2000, 5 + seed), CLASSES, chosen, f"shifted {seed}", out)


def test_fairness_keeps_classes_in_use_and_beats_self_training_alone(tmp_path: Path) -> None:
    view = toy_clip()
    hits: dict[float, list[np.ndarray]] = {0.0: [], 1.0: []}
    used: dict[float, list[float]] = {0.0: [], 1.0: []}
    start = measure(view, classifier(view, CLASSES, (PROMPT,)), CLASSES, TARGET, settings(CONFIG, 0), "zeroshot")[0]
    print(f"\nzero-shot: {start.value:.3f} [{start.low:.3f}, {start.high:.3f}]")
    for fairness in hits:
        for seed in SEEDS:
            config = dataclasses.replace(CONFIG, fairness=fairness)
            method = train(settings(config, seed), tmp_path / f"{fairness}-{seed}")
            ((student, weights), _) = classifiers(method, view)
            top1, _, in_use = measure(student, weights, CLASSES, TARGET, settings(config, seed), "selftrain")
            print(
                f"fairness {fairness:g}, seed {seed}: {top1.value:.3f} [{top1.low:.3f}, {top1.high:.3f}], {in_use.note}"
            )
            hits[fairness].append(hits_of(top1))
            used[fairness].append(in_use.value or 0.0)
    # Every test image has an answer of each seed: these are drawn together.
    items = np.tile(np.arange(len(TARGET)), len(SEEDS))
    gain = paired_difference(np.concatenate(hits[1.0]), np.concatenate(hits[0.0]), items)
    over = paired_difference(np.concatenate(hits[1.0]), np.tile(hits_of(start), len(SEEDS)), items)
    print(f"over self-training alone: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    print(f"over zero-shot: {over.value:+.3f} [{over.low:+.3f}, {over.high:+.3f}]")
    assert min(used[1.0]) >= 0.9
    assert gain.value >= 0.05 and gain.low > 0


def test_losses_on_masked_patches_fall_and_pixels_beat_the_mean_colour(tmp_path: Path) -> None:
    """On clip art: in the shapes a patch's background tells next to nothing about its neighbour's."""
    # These two losses by themselves, and all layers at one rate: a few hundred steps stand for tens of thousands.
    config = dataclasses.replace(CONFIG, mask_ratio=0.3, threshold=1.0, fairness=0.0)
    chosen = settings(config, 0, lr=1e-3)
    chosen = dataclasses.replace(
        chosen,
        optim=dataclasses.replace(chosen.optim, layer_decay=1.0),
        fit=dataclasses.replace(chosen.fit, batch=50, epochs=10),
    )
    images = read_pairs(locate("samples:clipart/train"), ()).thinned(2000)
    method = self_train(toy_clip(), images, CLASSES, chosen, "clipart", tmp_path)
    log = read_log(tmp_path)
    for name in ("loss/pixels", "loss/align"):
        print(f"\n{name}: {log[0][name]:.3f} at step {log[0]['step']} -> {log[-1][name]:.3f}")
        assert log[-1][name] < 0.9 * log[0][name]
    prepare, held_out = method.prepare(Crop(), 32), read_pairs(locate("samples:clipart/test"), ())
    examples = [prepare(held_out.document(i, key(0, i)), key(0, i)) for i in range(200)]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in ("strong", "mask")}
    batch = Batch(tensors, torch.arange(200), torch.arange(200))
    truth, mask = patchify(batch["strong"].float() / 255, 8).unflatten(2, (64, 3)), batch["mask"]
    made = patchify(method.reconstruct(batch), 8).unflatten(2, (64, 3))
    visible = ~mask
    mean = (truth.mean(dim=2) * visible.unsqueeze(-1)).sum(dim=1) / visible.sum(dim=1, keepdim=True)

    def error(guess: torch.Tensor) -> np.ndarray:
        each = (guess - truth).abs().mean(dim=(2, 3))
        return ((each * mask).sum(dim=1) / mask.sum(dim=1)).numpy()

    average, filled = error(mean[:, None, None]), error(made)
    less = paired_difference(average, filled)
    print(
        f"mean colour of what is visible: {average.mean():.4f}, MUST: {filled.mean():.4f}, lower by {less.value:.4f} "
        f"[{less.low:.4f}, {less.high:.4f}]"
    )
    assert less.low > 0
