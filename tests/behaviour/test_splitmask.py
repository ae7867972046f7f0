"""SplitMask's parts: inpainting is what the features come from, and matching the halves costs it nothing.

Specification 6.7: names of patches get likelier by 0.8 nats, matching does not make them less likely again, and a
linear probe reads inpainting better than matching alone, and that better than no training. Three runs of 600 steps on
made-up pictures, about ten minutes on a core of its own. What was found is printed (`pytest -rP`).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from altsight.core.config import OptimConfig
from altsight.data.views import Crop
from altsight.evals.base import Result
from altsight.evals.bootstrap import hits_of, paired_difference
from altsight.evals.load import load_view, view_of
from altsight.methods.base import Corpus
from altsight.methods.splitmask import SplitMask
from altsight.nn.encoder import EncoderConfig
from altsight.nn.tokens import TokenizerConfig
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig, build
from tests.behaviour.conftest import prepared_shapes, probe, shapes_task

pytestmark = pytest.mark.slow
STEPS, BATCH, WORDS, PAIRS = 600, 96, 512, 8000
WEIGHTS = {"inpaint": (1.0, 0.0), "match": (0.0, 1.0), "both": (1.0, 1.0)}
"""Arm -> weights of inpainting and matching."""


@dataclass(frozen=True)
class Found:
    """The probe, and the means of the first and last ten steps: nats a patch, and nats of matching."""

    probe: Result
    inpaint: tuple[float, float] = (0.0, 0.0)
    match: tuple[float, float] = (0.0, 0.0)


def run_of(arm: str) -> Run[SplitMask.Config]:
    inpaint, match = WEIGHTS[arm]
    config = SplitMask.Config(TokenizerConfig(vocabulary=WORDS), inpaint_weight=inpaint, match_weight=match)
    return Run(
        "splitmask",
        config,
        OptimConfig(lr=2e-3, lr_base_batch=0, betas=(0.9, 0.999), warmup_fraction=0.1, clip_norm=3.0),
        EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=4, width=64, depth=3, heads=4),
        DataConfig(crop=Crop(scale=(0.5, 1.0)), workers=0),
        TrainConfig(STEPS * BATCH, BATCH, precision="fp32", device="cpu", log_every=1),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Arm -> what was found; "untrained" is the encoder that all start from."""
    folder = tmp_path_factory.mktemp("splitmask")
    data, task = prepared_shapes(folder, PAIRS), shapes_task(test=6000)
    untrained = view_of(build(run_of("both"), Corpus.of(data)), "untrained")
    results = {"untrained": Found(probe(untrained, task))}
    for arm in WEIGHTS:
        pretrain(run_of(arm), data, folder / arm)
        lines = [line for line in read_log(folder / arm) if "loss" in line]
        parts = [[line[f"loss/{name}"] for line in lines] for name in ("b_from_a", "a_from_b", "match")]
        first, last = ([sum(part[at]) / 10 for part in parts] for at in (slice(10), slice(-10, None)))
        inpaint = (sum(first[:2]) / 2, sum(last[:2]) / 2)
        results[arm] = Found(probe(load_view(folder / arm), task), inpaint, (first[2], last[2]))
    for arm, result in results.items():
        print(
            f"{arm}: probe {result.probe.value:.3f} [{result.probe.low:.3f}, {result.probe.high:.3f}], nats a patch "
            f"{result.inpaint[0]:.2f} -> {result.inpaint[1]:.2f}, of matching {result.match[0]:.2f} -> "
            f"{result.match[1]:.2f}"
        )
    return results


def better(found: dict[str, Found], one: str, other: str) -> bool:
    difference = paired_difference(hits_of(found[one].probe), hits_of(found[other].probe))
    print(one, "-", other, difference)
    return difference.low > 0


def test_words_of_hidden_patches_get_likelier(found: dict[str, Found]) -> None:
    for arm in ("inpaint", "both"):
        start, end = found[arm].inpaint
        assert start - end >= 0.8, arm


def test_matching_costs_inpainting_nothing(found: dict[str, Found]) -> None:
    assert found["both"].inpaint[1] < found["inpaint"].inpaint[1] + 0.05
    assert found["both"].match[1] < found["inpaint"].match[1] - 0.5, "matching is learned where it is asked for"


def test_inpainting_then_matching_then_nothing(found: dict[str, Found]) -> None:
    assert better(found, "inpaint", "match")
    assert better(found, "match", "untrained")
