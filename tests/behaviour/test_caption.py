"""Captions say what an encoder sees: from a trained one they fit their images, from an untrained one hardly.

Three minutes on a core of its own. Made-up pictures with six true captions each; the language model starts from random
weights and the encoder is frozen. `chance` deals the same captions to other images.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.meteor.meteor import Meteor

from altsight.core.rng import key
from altsight.evals.base import Result, View
from altsight.evals.caption_metrics import caption_scores, ptb
from altsight.nn.prefix import LanguageSize
from altsight.transfer.base import FitConfig
from altsight.transfer.caption import Caption
from altsight.transfer.captioner import DecoderKind
from tests.toy import toy_clip
from tests.transfer.test_caption import write_shapes

pytestmark = pytest.mark.slow
IMAGES, HELD_OUT, EPOCHS = 300, 200, 4


def untrained(seed: int) -> View:
    view = toy_clip()
    view.encoder.init_weights(key(seed, 0, "untrained"))
    return view


def settings(folder: Path, decoder: DecoderKind, lr: float, epochs: float, seed: int, **more: Any) -> Caption:
    return Caption(
        str(folder / "train" / "table.jsonl"),
        str(folder / "test" / "table.jsonl"),
        captions=("{captions[]}",),
        decoder=decoder,
        size=LanguageSize(64, 2, 2),
        length=24,
        vocab_size=400,
        lr=lr,
        metrics=("cider",),
        fit=FitConfig(epochs, 64, seed=seed, precision="fp32", device="cpu", workers=0),
        **more,
    )


def made(folder: Path, seed: int) -> Path:
    folder.mkdir()
    write_shapes(folder / "train", IMAGES, 100 + seed)
    write_shapes(folder / "test", HELD_OUT, 1100 + seed)
    return folder


def cider_of(captioner: Caption, view: View, out: Path, name: str) -> Result:
    (result,) = captioner(view, out)
    assert result.value is not None and result.low is not None and result.high is not None
    figures = f"CIDEr {result.value:.2f} [{result.low:.2f}, {result.high:.2f}], chance {result.chance:.2f}"
    print(f"{captioner.decoder}, seed {captioner.fit.seed}, {name}: {figures}")
    return result


@pytest.mark.parametrize(("decoder", "lr", "seeds"), [("prefix", 3e-3, 3), ("visualgpt", 1e-3, 2)])
def test_captions_from_a_trained_encoder_fit_their_images(
    tmp_path: Path, decoder: DecoderKind, lr: float, seeds: int
) -> None:
    for seed in range(seeds):
        folder = made(tmp_path / str(seed), seed)
        captioner = settings(folder, decoder, lr, EPOCHS, seed)
        trained = cider_of(captioner, toy_clip(), folder / "trained", "trained encoder")
        other = cider_of(captioner, untrained(seed), folder / "untrained", "untrained encoder")
        assert trained.low is not None and trained.chance is not None and other.high is not None
        assert trained.low > other.high
        assert trained.low > trained.chance + 0.5


def test_the_second_stage_raises_cider_on_held_out_images(tmp_path: Path) -> None:
    """After three epochs, half an epoch of it; on average over three seeds by a tenth."""
    gains = []
    for seed in range(3):
        folder = made(tmp_path / str(seed), seed)
        first = settings(folder, "prefix", 3e-3, 3, seed)
        before = cider_of(first, toy_clip(), folder / "out", "first stage").value
        second = replace(first, reinforce_epochs=0.5, reinforce_lr=2e-4)
        after = cider_of(second, toy_clip(), folder / "out", "second stage").value
        assert before is not None and after is not None
        gains.append(after / before - 1)
    print("gains " + ", ".join(f"{gain:.0%}" for gain in gains))
    assert min(gains) > 0
    assert sum(gains) / 3 >= 0.1


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_meteor_equals_the_reference_library() -> None:
    references = [["A red fox runs over the snow.", "a fox in the snow"], ["two dogs"], ["a man isn't riding"]]
    captions = ["a fox running over snow", "", "nobody is riding"]
    (score,) = caption_scores(captions, references, ("meteor",))
    truth = {i: ptb(texts) for i, texts in enumerate(references)}
    expected, _ = Meteor().compute_score(truth, {i: ptb([text]) for i, text in enumerate(captions)})
    assert score.metric == "meteor" and score.value == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
