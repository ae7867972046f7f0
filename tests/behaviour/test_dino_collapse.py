"""What keeps DINO from collapsing: with centring and sharpening it learns, without them the collapse meters say so.

Tiny runs on made-up shapes (specification 2.9), which differ in how the teacher's logits become targets and in
nothing else. Features are read at DINO's own point, the CLS token. About four minutes on one free core.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from altsight.core.config import OptimConfig
from altsight.data.multicrop import dino_views
from altsight.evals import evaluate
from altsight.evals.base import Result
from altsight.evals.load import view_of
from altsight.losses.self_distillation import TargetConfig
from altsight.methods.base import Corpus, Method
from altsight.methods.dino import DINO, HeadConfig
from altsight.nn.encoder import EncoderConfig
from altsight.train.loop import pretrain
from altsight.train.run import Run, TrainConfig, build
from tests.behaviour.conftest import prepared_shapes, probe, shapes_task

pytestmark = pytest.mark.slow
BATCH, STEPS, SHORT, PROTOTYPES = 32, 1200, 200, 128
SHARP, DULL = 0.02, 0.1
"""Temperatures of the teacher: a fifth of the student's; the student's own."""
VIEWS = dataclasses.replace(dino_views((0.4, 1.0), (0.1, 0.4), 2), local_size=16)
# A run of a thousand steps has no time for DINO's own speeds: a faster teacher and a centre that keeps ahead of it.
CONFIG = DINO.Config(
    views=VIEWS,
    head=HeadConfig(hidden=128, bottleneck=16, prototypes=PROTOTYPES),
    teacher_momentum=0.98,
    freeze_last_layer=0.05,
)
OPTIM = dataclasses.replace(DINO.optim, lr=2e-3, lr_base_batch=0, final_weight_decay=None, warmup_fraction=0.1)
ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=64, depth=3, heads=4)


@dataclass(frozen=True)
class Found:
    """A method at some time: k-NN by field, collapse meters, and what its log says."""

    knn: dict[str, Result]
    meters: dict[str, Result]
    log: dict[str, float]

    @property
    def collapsed(self) -> bool:
        """True if a meter says so."""
        return any(meter.note.startswith("collapsed") for meter in self.meters.values())

    def __str__(self) -> str:
        numbers = {name: result.value for name, result in (self.knn | self.meters).items()} | self.log
        return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items() if value is not None)


def look(method: Method) -> Found:
    task = shapes_task()
    view = dataclasses.replace(view_of(method, "dino"), feature_point="cls")
    knn = {field: probe(view, task, field, "knn") for field in ("label", "colour")}
    return Found(knn, {r.metric: r for r in evaluate(view, [task], ["collapse"])}, method.report())


def run_of(targets: TargetConfig, steps: int, optim: OptimConfig = OPTIM) -> Run[DINO.Config]:
    train = TrainConfig(BATCH * steps, BATCH, precision="fp32", device="cpu", probe_every=BATCH * steps // 2)
    return Run("dino", dataclasses.replace(CONFIG, targets=targets), optim, ENCODER, train=train)


def train(targets: TargetConfig, steps: int, folder: Path) -> list[Found]:
    """Train and return what is found after half of the steps and after all of them."""
    found: list[Found] = []

    def note(method: Method) -> dict[str, float]:
        found.append(look(method))
        print(folder.name, found[-1])
        return {}

    pretrain(run_of(targets, steps), prepared_shapes(folder / "data", 4096), folder / "run", note)
    return found


@pytest.fixture(scope="module")
def untrained() -> Found:
    found = look(build(run_of(TargetConfig(), 1), Corpus()))
    print("untrained", found)
    return found


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    targets = TargetConfig("softmax", momentum=0.7, temperature=(SHARP, SHARP))
    return train(targets, STEPS, tmp_path_factory.mktemp("healthy"))


def test_with_centring_and_sharpening_it_learns(untrained: Found, healthy: list[Found]) -> None:
    half, end = healthy
    colours = [found.knn["colour"].value for found in (untrained, half, end)]
    assert colours == sorted(colours), colours
    for field in ("label", "colour"):
        before, low = untrained.knn[field].value, end.knn[field].low
        assert before is not None and low is not None and low > before, field
    assert not untrained.collapsed and not half.collapsed and not end.collapsed


def test_the_targets_neither_become_one_nor_stay_even(healthy: list[Found]) -> None:
    log = healthy[-1].log
    assert 0.5 < log["target_entropy"] < math.log(PROTOTYPES) - 0.5
    assert log["prototype_entropy"] > log["target_entropy"] + 0.5


@pytest.mark.parametrize("temperature", [SHARP, DULL], ids=["sharp", "dull"])
def test_without_centring_it_collapses(
    temperature: float, untrained: Found, healthy: list[Found], tmp_path: Path
) -> None:
    """With sharpening all images get one prototype, without it one and the same mixture of them."""
    end = train(TargetConfig("none", temperature=(temperature, temperature)), SHORT, tmp_path / f"{temperature}")[-1]
    assert end.collapsed
    assert end.log["prototype_entropy"] - end.log["target_entropy"] < 0.01
    assert (end.log["target_entropy"] < 0.01) is (temperature == SHARP)
    learned = healthy[-1].knn["colour"]
    high, low = end.knn["colour"].high, learned.low
    assert high is not None and low is not None and high < low
