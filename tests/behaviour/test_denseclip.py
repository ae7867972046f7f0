"""DenseCLIP: only with their own loss do the score maps say where things are (specification 7.6 and 10b)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from altsight.data.scenes import Scenes, write_ade20k
from altsight.data.segmentation import read_masked
from altsight.evals.base import Result
from altsight.evals.segmentation import Windows, score
from altsight.nn.dense import resize
from altsight.train.checkpoint import load_latest
from altsight.transfer.base import FitConfig
from altsight.transfer.denseclip import OPTIM, DenseCLIP
from altsight.transfer.scoremaps import ScoreMaps
from altsight.transfer.segmenter import Segmenter
from tests.toy import toy_clip

pytestmark = pytest.mark.slow

TRAIN, TEST, STEPS, BATCH = 300, 60, 480, 16


def trained(data: Path, out: Path, auxiliary: float, seed: int) -> tuple[Result, Segmenter]:
    """Return the mean IoU of what is predicted, and the trained method."""
    transfer = DenseCLIP(
        str(data),
        size=64,
        room=12,
        channels=32,
        auxiliary=auxiliary,
        optim=replace(OPTIM, lr=1e-3, lr_base_batch=0, warmup_fraction=0.1),
        fit=FitConfig(epochs=STEPS * BATCH / TRAIN, batch=BATCH, seed=seed, workers=0, precision="fp32", device="cpu"),
    )
    whole, _ = transfer(toy_clip(), out)
    method = transfer.build(toy_clip(), Scenes(1).names)
    saved = load_latest(out / "checkpoints", print)
    assert saved is not None
    method.load_state_dict(saved["method"])
    return whole, method.eval()


def of_scores(method: Segmenter, data: Path) -> Result:
    """Return the mean IoU of the class whose score is highest at a place, without what comes after."""
    decoder = method.decoder
    assert isinstance(decoder, ScoreMaps)

    def logits(images: Tensor) -> Tensor:
        encoded = method.encoder(method.encoder.normalize(images))
        return resize(decoder.scores(method.encoder, encoded), images.shape[2:])

    validation = read_masked(data, "validation", Scenes(1).names)
    fields = {"task": "scenes", "evaluator": "score maps", "feature_point": "projected patches"}
    return score(logits, validation, Windows(64, "half"), **fields)[0]


def described(result: Result) -> str:
    assert result.value is not None and result.low is not None and result.high is not None
    return f"{result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"


@pytest.mark.parametrize("seed", [0, 1])
def test_score_maps_need_their_own_loss(tmp_path: Path, seed: int) -> None:
    data = tmp_path / "scenes"
    write_ade20k(data, Scenes(TRAIN, pixels=64), Scenes(TEST, seed=1, pixels=64))
    with_loss, method = trained(data, tmp_path / "with", 0.4, seed)
    without_loss, other = trained(data, tmp_path / "without", 0.0, seed)
    scored, unscored = of_scores(method, data), of_scores(other, data)
    gamma = method.decoder.get_parameter("gamma")
    print(f"seed {seed}: mean IoU of the score maps {described(scored)} with their loss, {described(unscored)} without")
    print(f"  of the prediction {described(with_loss)} with, {described(without_loss)} without")
    print(f"  gamma from 0.0001 to {gamma.abs().mean():.3f} on average, {gamma.abs().max():.3f} at most")
    assert scored.value is not None and unscored.value is not None
    assert scored.value >= 0.5 and unscored.value <= 0.2
    assert gamma.abs().max() > 0.01
