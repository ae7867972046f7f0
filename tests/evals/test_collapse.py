from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from altsight.evals import collapse as module
from altsight.evals.base import Task
from altsight.evals.collapse import alignment, collapse, effective_rank, spread_std, uniformity
from tests.evals.conftest import COLOURS, ColourEncoder, MakeSplit, Sample, coloured, make_view


def test_effective_rank_of_known_matrices() -> None:
    draw = np.random.default_rng(0)
    rank_one = torch.tensor(np.outer(draw.normal(size=40), draw.normal(size=8)))
    assert effective_rank(rank_one) == pytest.approx(1, abs=1e-6)
    orthonormal = torch.tensor(np.linalg.qr(draw.normal(size=(40, 8)))[0])
    assert effective_rank(orthonormal) == pytest.approx(8)
    assert effective_rank(torch.ones(10, 4)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(10, 4)) == 0


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    shares = [0.5, 0.25, 0.125, 0.125]
    entropy = -sum(p * math.log(p) for p in shares)
    assert effective_rank(3 * torch.diag(torch.tensor(shares))) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_std_is_one_for_even_and_zero_for_equal_features() -> None:
    draw = np.random.default_rng(0)
    even = torch.tensor(draw.normal(size=(5000, 32)))
    assert spread_std(even) == pytest.approx(1, abs=0.01)
    assert spread_std(torch.ones(10, 4)) == 0
    # Only directions count: the length of a feature does not.
    assert spread_std(even * torch.linspace(1, 50, 5000)[:, None]) == pytest.approx(spread_std(even))


def test_uniformity_and_alignment_are_the_formulas() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(9, 4)), draw.normal(size=(9, 4))
    unit_a = [row / math.sqrt(sum(x * x for x in row)) for row in a]
    unit_b = [row / math.sqrt(sum(x * x for x in row)) for row in b]
    kernel = [math.exp(-2 * sum((unit_a[i] - unit_a[j]) ** 2)) for i in range(9) for j in range(i)]
    assert uniformity(torch.tensor(a)) == pytest.approx(math.log(sum(kernel) / len(kernel)))
    distances = [sum((x - y) ** 2) for x, y in zip(unit_a, unit_b, strict=True)]
    assert alignment(torch.tensor(a), torch.tensor(b)) == pytest.approx(sum(distances) / 9)


def test_meters_of_a_view(colours: Task) -> None:
    results = {r.metric: r for r in collapse(make_view(dual=True), colours)}
    assert set(results) == {"effective_rank", "std", "uniformity", "alignment_flip", "alignment_pairs"}
    assert 2 < (results["effective_rank"].value or 0) <= 3
    # A single colour is its own mirror image.
    assert results["alignment_flip"].value == pytest.approx(0, abs=1e-10)
    assert results["alignment_pairs"].value == pytest.approx(0, abs=0.01)
    assert all(r.n == 24 and len(r.data) == 12 and r.preprocess and not r.note for r in results.values())
    assert results["alignment_pairs"].feature_point == "mean, projected"


def test_pairs_need_a_text_tower_and_captions(colours: Task, make_split: MakeSplit) -> None:
    pairs = list(collapse(make_view(), colours))[-1]
    assert pairs.metric == "alignment_pairs" and pairs.value is None
    assert pairs.note == "not applicable: this encoder has no text tower"
    plain = make_split("plain", [Sample(COLOURS["red"]), Sample(COLOURS["blue"])])
    metrics = [r.metric for r in collapse(make_view(dual=True), Task("t", plain, plain, plain))]
    assert "alignment_pairs" not in metrics and len(metrics) == 4


def test_pairs_match_each_image_with_its_own_caption(make_split: MakeSplit) -> None:
    samples = coloured(2)
    samples[0], samples[2] = Sample(None, text="red"), Sample(COLOURS["blue"])
    split = make_split("gaps", samples)
    pairs = list(collapse(make_view(dual=True), Task("t", split, split, split)))[-1]
    assert pairs.value == pytest.approx(0, abs=0.01) and pairs.n == 4


def test_the_flip_is_seen(make_split: MakeSplit) -> None:
    class LeftEncoder(ColourEncoder):
        """Features are the left half of the image and the right half, apart."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            ramp = torch.linspace(-1, 1, images.shape[-1])
            return torch.cat([(images * ramp).mean(dim=(2, 3)), (images + ramp[0] - ramp).square().mean(dim=(2, 3))], 1)

    split = make_split("test", coloured(3))
    view = make_view(LeftEncoder())
    source = split.source
    pixels = torch.stack([view.preprocess(source.image(i)) for i in range(9)])
    expected = alignment(view.features(pixels), view.features(pixels.flip(3)))
    found = {r.metric: r.value for r in collapse(view, Task("t", split, split, split))}
    assert found["alignment_flip"] == pytest.approx(expected)


def test_a_collapse_is_said_in_plain_words(colours: Task) -> None:
    class Constant(ColourEncoder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 200) + 1e-4 * images.mean(dim=(1, 2, 3))[:, None]

    results = {r.metric: r for r in collapse(make_view(Constant()), colours)}
    assert results["std"].note == "collapsed: all images get nearly the same features (std 0.000 where 1 is even)"
    assert results["uniformity"].value == pytest.approx(0, abs=1e-6)


def test_a_low_rank_is_said_in_plain_words(make_split: MakeSplit) -> None:
    class Line(ColourEncoder):
        """Half of the images at one point, half at the opposite one, in 60 dimensions."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            side = (images[:, 0].mean(dim=(1, 2)) > 0).float() * 2 - 1
            return side[:, None].expand(-1, 60)

    split = make_split("test", coloured(30, names=["red", "blue"]))
    results = {r.metric: r for r in collapse(make_view(Line(), batch_size=64), Task("t", split, split, split))}
    assert results["effective_rank"].note == "collapsed: the features use 1.0 of 60 dimensions"
    assert results["std"].note == ""


def test_large_splits_are_read_in_part(colours: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IMAGES", 10)
    monkeypatch.setattr(module, "MAX_PAIRS", 4)
    counts = {r.metric: r.n for r in collapse(make_view(dual=True), colours)}
    assert counts == {"effective_rank": 10, "std": 10, "uniformity": 10, "alignment_flip": 4, "alignment_pairs": 10}
    assert module._spread(10, 4) == [0, 2, 5, 7]


def test_a_single_image_yields_nothing(make_split: MakeSplit) -> None:
    split = make_split("one", coloured(1, names=["red"]))
    assert list(collapse(make_view(), Task("t", split, split, split))) == []
