"""Detection learns to find and cut out the emoji of made-up scenes, better than on a frozen random encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from altsight.core.rng import key
from altsight.data.scenes import Scenes, write_coco
from altsight.evals.base import Result, View
from altsight.nn.encoder import Encoder
from altsight.transfer.base import FitConfig, with_view
from altsight.transfer.detect import Detect
from altsight.transfer.detector import Detector, DetectorConfig
from tests.toy import toy_clip

pytestmark = pytest.mark.slow

CONFIG = DetectorConfig(width=32, hidden=64, most=4, proposals=100, sampled=32, jitter=(0.6, 1.4))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 scenes to learn from and 100 others, of 96 pixels, with up to three of six kinds of things."""
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco(folder, Scenes(200), Scenes(100, seed=1))
    return folder


def detect(view: View, scenes: Path, out: Path, epochs: float, frozen: bool = False) -> dict[str, Result]:
    settings = Detect(
        str(scenes),
        size=96,
        drop_path=0.0,
        frozen=frozen,
        detector=CONFIG,
        optim=dataclasses.replace(Detector.optim, lr=3e-3, warmup_fraction=0.1),
        fit=FitConfig(epochs=epochs, batch=8, workers=0, precision="fp32", device="cpu"),
    )
    return {result.metric: result for result in settings(view, out)}


def told(name: str, found: dict[str, Result]) -> None:
    box, mask = found["box_ap"], found["mask_ap"]
    print(
        f"\n{name}: box AP {box.value} [{box.low}, {box.high}], AP50 {found['box_ap50'].value}; "
        f"mask AP {mask.value} [{mask.low}, {mask.high}], AP50 {found['mask_ap50'].value}"
    )


def test_it_finds_things_and_their_masks(scenes: Path, tmp_path: Path) -> None:
    view = toy_clip()
    random = Encoder(view.encoder.config)
    random.init_weights(key(0, 0))
    tuned = detect(view, scenes, tmp_path / "tuned", epochs=12)
    told("tuned from CLIP", tuned)
    blind = detect(with_view(view, random), scenes, tmp_path / "random", epochs=12, frozen=True)
    told("frozen random encoder", blind)
    untrained = detect(view, scenes, tmp_path / "untrained", epochs=0.01)
    told("one step", untrained)
    for kind in ("box", "mask"):
        assert (tuned[f"{kind}_ap50"].value or 0) > 0.4
        assert (tuned[f"{kind}_ap"].low or 0) > (blind[f"{kind}_ap"].value or 0), kind
        assert (untrained[f"{kind}_ap50"].value or 0) < 0.05
