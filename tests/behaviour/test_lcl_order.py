"""The order of LCL's Table 1 on made-up interleaved documents: LCL, then generation alone, then with regression.

Yang et al. 2024 (specification LCL 2.9): 75.2, 24.0 and 5.7 % on ImageNet with frozen encoders, the latter two
collapsed. Here documents hold two pictures of `Shapes` with a sentence on each, before or behind it, among six
sentences of random words: as in web pages, most of the text is about other things and cannot be predicted, which is
what generation has to learn through. (Where there is one other sentence, a fixed one, generation alone learns as much
as LCL does: 30.6 and 31.4 % after 900 steps.) All objectives get the same documents in the same order, encoder,
optimizer and steps. What was found is printed (`pytest -rP`). About a quarter of an hour on a core of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from altsight.core.config import OptimConfig
from altsight.core.rng import key
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared
from altsight.data.shapes import Shapes
from altsight.data.views import Crop
from altsight.evals import evaluate
from altsight.evals.base import Task, View
from altsight.evals.bootstrap import Interval, hits_of, interval, paired_difference
from altsight.evals.load import load_method, view_of
from altsight.methods.base import Corpus
from altsight.methods.lcl import LCL
from altsight.nn.encoder import EncoderConfig
from altsight.nn.interleaved import LanguageConfig
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig, build
from tests.behaviour.conftest import probe, shapes_task

pytestmark = pytest.mark.slow
ARMS = ("lcl", "generation", "generation_regression")
SEEDS = (0, 1)
DOCUMENTS, PICTURES, OTHERS = 2000, 2, 6
STEPS, BATCH = 1800, 16
TEST = 2000

ABOUT_A_PICTURE = (
    "a {colour} {shape}",
    "{colour} {shape}",
    "this is a {colour} {shape}",
    "look at the {colour} {shape}",
)
WORDS = [
    first + second
    for first in ("ba", "ko", "mi", "ru", "ta", "ne", "sol", "pir", "den", "vak")
    for second in ("lor", "min", "ta", "gus", "pel", "rix", "on", "dra", "fe", "zu")
]
"""What the other sentences are made of, eight words each."""


def write_documents(folder: Path) -> None:
    """Write documents in the layout of MMC4: two sentences with a picture each and six without, in any order."""
    (folder / "images").mkdir(parents=True)
    shapes = Shapes(DOCUMENTS * PICTURES)
    lines = []
    for number in range(DOCUMENTS):
        draw = key(0, number, "document").generator()
        texts: list[str] = []
        images: list[dict[str, Any]] = []
        for part in draw.permutation(PICTURES + OTHERS).tolist():
            if part >= PICTURES:
                texts.append(" ".join(WORDS[i] for i in draw.integers(len(WORDS), size=8)))
                continue
            i = number * PICTURES + part
            (folder / "images" / f"{i}.png").write_bytes(shapes.image(i))
            images.append({"image_name": f"{i}.png", "matched_text_index": len(texts), "matched_sim": None})
            texts.append(ABOUT_A_PICTURE[draw.integers(len(ABOUT_A_PICTURE))].format(**shapes.fields(i)))
        lines.append(json.dumps({"text_list": texts, "image_info": images}))
    (folder / "documents.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder / "raw")
    return prepare(PrepareConfig(str(folder / "raw"), folder / "prepared", vocab_size=512, workers=1))


def run_of(prepared: Prepared, objective: Any, seed: int) -> Run[Any]:
    return Run(
        name="lcl",
        method=LCL.Config(LanguageConfig(64, 4, 2), data="interleaved", sequence=160, objective=objective),
        optim=OptimConfig(lr=2e-3, lr_base_batch=0, weight_decay=0.05, betas=(0.9, 0.98), warmup_fraction=0.1),
        encoder=EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=64, depth=3, heads=4),
        data=DataConfig(str(prepared.directory), Crop(scale=(0.9, 1.0), flip=False), workers=0),
        train=TrainConfig(samples=STEPS * BATCH, batch=BATCH, seed=seed, precision="fp32", device="cpu"),
    )


class Found:
    """What was found of one arm under all seeds: hits of the linear probe, spread of the features."""

    def __init__(self) -> None:
        self.hits: list[npt.NDArray[np.bool_]] = []
        self.spread: list[float] = []

    def add(self, view: View, task: Task) -> None:
        self.hits.append(hits_of(probe(view, task)))
        self.spread += [
            r.value for r in evaluate(view, [task], ["collapse"]) if r.metric == "std" and r.value is not None
        ]

    @property
    def accuracy(self) -> Interval:
        """Mean over seeds and test items; an item's hits under all seeds are drawn together."""
        return interval(np.concatenate(self.hits), items())


def items() -> npt.NDArray[np.int64]:
    """Return which test item each hit of `Found.hits`, seed after seed, is of."""
    return np.tile(np.arange(TEST), len(SEEDS))


@pytest.fixture(scope="module")
def found(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Results by arm; "untrained" are the encoders that the arms start from."""
    task = shapes_task(test=TEST)
    results = {arm: Found() for arm in (*ARMS, "untrained")}
    for seed in SEEDS:
        for arm in ARMS:
            run, folder = run_of(prepared, arm, seed), tmp_path_factory.mktemp(f"{arm}{seed}")
            pretrain(run, prepared, folder)
            results[arm].add(view_of(load_method(folder)[1], arm), task)
            last = [line for line in read_log(folder) if "loss" in line][-1]
            print(arm, seed, {name: round(value, 3) for name, value in last.items() if name.startswith("loss/")})
        results["untrained"].add(view_of(build(run_of(prepared, "lcl", seed), Corpus.of(prepared)), "untrained"), task)
    for arm, result in results.items():
        print(arm, result.accuracy, [round(float(hits.mean()), 3) for hits in result.hits], result.spread)
    return results


def better(found: dict[str, Found], one: str, other: str) -> Interval:
    """Return by how much the probe reads `one` better than `other`, over the same items and seeds."""
    difference = paired_difference(np.concatenate(found[one].hits), np.concatenate(found[other].hits), items())
    print(one, "-", other, difference)
    return difference


def test_lcl_then_generation_then_generation_with_regression(found: dict[str, Found]) -> None:
    assert better(found, "lcl", "generation").low > 0
    assert better(found, "generation", "generation_regression").low > 0
    assert better(found, "lcl", "untrained").low > 0
    for lcl, generation, regression in zip(*(found[arm].hits for arm in ARMS), strict=True):
        assert lcl.mean() > generation.mean() > regression.mean()  # under each seed


def test_regression_of_pictures_makes_them_alike(found: dict[str, Found]) -> None:
    """Its features are within a few percent of one vector; those of LCL are spread wider than before training."""
    assert max(found["generation_regression"].spread) < 0.5 * min(found["untrained"].spread)
    assert min(found["lcl"].spread) > max(found["untrained"].spread)
