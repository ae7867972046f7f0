"""Every method that writes captions writes them by any decoding, each image's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.evals.load import view_of
from altsight.methods import find
from altsight.methods.base import Corpus
from altsight.nn.decoding import BEAM, GREEDY, Decoding
from altsight.nn.encoder import Encoder
from tests.contract.tiny import tiny_run

WRITERS = ("mug", "coca", "virtex", "visualgpt", "lcl")


@pytest.fixture(params=WRITERS)
def method(request: pytest.FixtureRequest, encoder: Encoder, corpus: Corpus) -> Any:
    config = tiny_run(request.param, Path(), 32).method
    made: Any = find(request.param)(config, encoder, corpus)  # type: ignore[call-arg]
    made.init_weights(key(0, 0, "init"))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(
                0.3 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) if p.ndim > 1 else 0
            )
            p.mul_(3 if p.ndim > 1 else 1)  # far from uniform chances
    return made


def test_one_beam_and_a_cold_nucleus_are_greedy(method: Any, batch: Batch) -> None:
    greedy = method.caption(batch["image"], max_length=8, decoding=GREEDY)
    for decoding in (Decoding("beam", beams=1), Decoding("nucleus", top_p=1e-6), Decoding("nucleus", temperature=1e-4)):
        assert method.caption(batch["image"], max_length=8, decoding=decoding) == greedy


def test_an_image_has_the_same_caption_in_any_batch(method: Any, batch: Batch) -> None:
    for decoding in (BEAM, Decoding("nucleus", top_p=0.5, seed=3)):
        whole = method.caption(batch["image"], max_length=8, decoding=decoding)
        single = [method.caption(batch["image"][i : i + 1], max_length=8, decoding=decoding)[0] for i in range(3)]
        assert single == whole


def test_a_view_writes_what_its_method_writes(method: Any, batch: Batch) -> None:
    view = view_of(method, "written")
    assert view.caption is not None
    assert view.caption(batch["image"], decoding=BEAM) == method.caption(batch["image"], decoding=BEAM)
