from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from altsight.evals import linear as module
from altsight.evals.base import Task
from altsight.evals.linear import Fit, Probe, linear, sweep
from tests.evals.conftest import ColourEncoder, MakeSplit, Sample, coloured, make_view, near

Floats = npt.NDArray[np.float64]


def clouds(n: int = 300, classes: int = 5, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return overlapping clouds far from the origin, whose axes have very different scales."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, n)
    x = draw.normal(size=(classes, width))[labels] + draw.normal(size=(n, width))
    return torch.tensor(x * np.logspace(-2, 1, width) + 7).float(), torch.tensor(labels)


def objective(vectors: torch.Tensor, labels: torch.Tensor, fit: Fit, strength: float) -> float:
    """Return the summed objective in numpy, from the formula."""
    logits = vectors.double().numpy() @ fit.weight.numpy() + fit.bias.numpy()
    loss = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        column = fit.classes.tolist().index(label)
        loss += np.log(np.exp(row - row.max()).sum()) + row.max() - row[column]
    return float(loss + strength / 2 * (fit.weight.numpy() ** 2).sum())


@pytest.mark.parametrize("strength", [100.0, 1.0, 0.01])
def test_the_minimum_is_that_of_scikit_learn(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-6)
    vectors, labels = clouds()
    fit = Probe(vectors, labels).fit(strength)
    known = LogisticRegression(C=1 / strength, solver="newton-cg", tol=1e-10, max_iter=1000)
    known.fit(vectors.double().numpy(), labels.numpy())
    # Only differences between classes are determined for the bias, which is not penalised.
    bias = known.intercept_ - known.intercept_.mean()
    np.testing.assert_allclose(fit.weight.numpy(), known.coef_.T, rtol=2e-3, atol=2e-3 * np.abs(known.coef_).max())
    np.testing.assert_allclose((fit.bias - fit.bias.mean()).numpy(), bias, rtol=2e-3, atol=2e-3 * np.abs(bias).max())


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("strength", [100.0, 1.0, 0.01])
def test_the_default_tolerance_is_no_worse_than_that_of_scikit_learn(strength: float) -> None:
    vectors, labels = clouds()
    known = LogisticRegression(C=1 / strength, max_iter=1000).fit(vectors.double().numpy(), labels.numpy())
    theirs = Fit(torch.tensor(known.coef_.T), torch.tensor(known.intercept_), torch.arange(5), 0, True)
    ours = Probe(vectors, labels).fit(strength)
    assert objective(vectors, labels, ours, strength) <= objective(vectors, labels, theirs, strength) * (1 + 1e-4)


@pytest.mark.parametrize("strength", [100.0, 1.0, 0.01])
def test_the_answers_on_other_samples_are_those_of_scikit_learn(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-6)
    vectors, labels = clouds(900)
    train, test = (vectors[:300], labels[:300]), (vectors[300:], labels[300:])
    found = Probe(*train).fit(strength).predict(test[0])
    known = LogisticRegression(C=1 / strength, solver="newton-cg", tol=1e-10, max_iter=1000)
    known.fit(train[0].double().numpy(), train[1].numpy())
    expected = known.predict(test[0].double().numpy())
    assert found.tolist() == expected.tolist()
    accuracy = float((found == test[1]).double().mean())
    assert accuracy == pytest.approx(accuracy_score(test[1].numpy(), expected), abs=1e-6)
    assert 0.3 < accuracy < 1, "the clouds overlap"


def test_a_warm_start_ends_where_a_cold_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-5)
    vectors, labels = clouds()
    warm, cold = Probe(vectors, labels), Probe(vectors, labels)
    warm.fit(10)
    a, b = warm.fit(0.1), cold.fit(0.1)
    assert a.iterations < b.iterations
    torch.testing.assert_close(a.weight, b.weight, rtol=5e-3, atol=5e-3)


def test_classes_that_the_training_data_lacks_are_never_predicted() -> None:
    fit = Probe(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([2, 2, 7])).fit(0.01)
    assert fit.predict(torch.tensor([[0.0], [6.0]])).tolist() == [2, 7]


def test_equal_features_predict_the_commonest_class() -> None:
    fit = Probe(torch.full((10, 3), 2.5), torch.tensor([0] * 3 + [1] * 7)).fit(1.0)
    assert fit.predict(torch.full((2, 3), 2.5)).tolist() == [1, 1]


@pytest.mark.parametrize("peak", [-6.0, -2.625, 0.0, 1.125, 6.0])
def test_the_sweep_finds_the_peak_on_the_grid_of_eighths(peak: float) -> None:
    tried: list[float] = []

    def accuracy(strength: float) -> float:
        tried.append(strength)
        return 1 - abs(math.log10(strength) - peak) / 100

    found = sweep(accuracy)
    assert max(found, key=lambda exponent: found[exponent]) == peak
    assert len(tried) == len(found) <= 7 + 4 * 2
    assert tried[:7] == [10.0**e for e in (6, 4, 2, 0, -2, -4, -6)]
    assert min(found) >= -6 and max(found) <= 6


def test_of_equal_accuracies_the_strongest_is_taken() -> None:
    tried = list(sweep(lambda strength: 0.5))
    assert tried[7:] == [5, 5.5, 5.75, 5.875]


def test_top1_of_a_view(colours: Task) -> None:
    (result,) = linear(make_view(), colours)
    assert result.value == 1
    assert (result.n, result.metric, result.split, result.feature_point) == (24, "top1", "test", "mean")
    assert result.extra["val_top1"] == 1
    assert result.extra["classes"] == 3


def test_features_are_read_before_the_projection(colours: Task) -> None:
    projection = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(projection.weight)
    (result,) = linear(make_view(dual=True, embed_image=projection), colours)
    assert result.value == 1


def test_shuffled_labels_give_chance(make_split: MakeSplit) -> None:
    draw = np.random.default_rng(0)

    def shuffled(count: int) -> list[Sample]:
        return [Sample(near("grey", i), str(kind)) for i, kind in enumerate(draw.integers(0, 4, count))]

    splits = [make_split(name, shuffled(120)) for name in ("train", "val", "test")]
    (result,) = linear(make_view(batch_size=64), Task("noise", *splits, label="kind"))
    assert result.low is not None and result.high is not None
    assert result.low < 0.25 < result.high


def test_an_encoder_without_information_scores_the_commonest_class(make_split: MakeSplit) -> None:
    encoder = ColourEncoder()
    torch.nn.init.zeros_(encoder.gain)
    samples = [Sample(near("red", i), "a" if i % 3 else "b") for i in range(30)]
    splits = [make_split(name, samples) for name in ("train", "val", "test")]
    (result,) = linear(make_view(encoder), Task("t", *splits, label="kind"))
    assert result.value == pytest.approx(2 / 3) == result.extra["commonest"]
    assert "end of the range" in result.note


def test_the_mean_over_classes_where_it_is_the_metric_of_the_task(make_split: MakeSplit) -> None:
    # Blue is never trained on, and is 2 of 22: 10/11 of the images are right, and 2/3 of the classes on average.
    seen, unseen = coloured(10, names=("red", "green")), coloured(2, names=("blue",))
    splits = make_split("train", seen), make_split("val", seen), make_split("test", seen + unseen)
    top1, mean = linear(make_view(), Task("few", *splits, label="kind", metrics=("mean_class",)))
    assert (top1.metric, mean.metric) == ("top1", "mean_class")
    assert top1.value == pytest.approx(20 / 22) and mean.value == pytest.approx(2 / 3)
    assert mean.low is not None and mean.chance == top1.chance and mean.data == top1.data and "hits" not in mean.extra


def test_a_task_without_labels_yields_nothing(colours: Task) -> None:
    assert list(linear(make_view(), Task("plain", colours.train, colours.val, colours.test))) == []
