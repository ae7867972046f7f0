"""Linear probe: logistic regression on frozen features, with CLIP's sweep of the L2 strength (specification D3).

Features are raw, as the encoder yields them before any projection: not standardised, not normalised. The objective is
scikit-learn's `LogisticRegression` with C = 1 / strength,

    sum_i cross_entropy(W x_i + b, y_i) + strength / 2 * |W|^2        (b is not penalised),

minimised with L-BFGS. The search runs in the principal axes of the centred features, each scaled by the curvature that
the objective has there. That is a change of coordinates, not of the problem: the minimum is the same, but L-BFGS
reaches it in tens of iterations where raw coordinates take hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.evals.base import Result, Task, View
from altsight.evals.bootstrap import class_interval, scored
from altsight.evals.features import Labelled, classes_of, content_hash, join_notes, labelled, rate_of_commonest

MAX_ITERATIONS = 1000
TOLERANCE = 5e-4
"""L-BFGS stops where no entry of the gradient of the mean loss, in the scaled coordinates, is larger.

On the sample data this ends at or below the objective that scikit-learn reaches with its defaults.
"""
COARSE = (6, 4, 2, 0, -2, -4, -6)
"""Decimal exponents of the strengths that are tried first, in this order."""
FINEST_STEP = 1 / 8
"""In decades."""


def linear(view: View, task: Task) -> Iterator[Result]:
    """Yield the top-1 accuracy of the linear probe: strength chosen on val, refitted on train + val, scored on test.

    Where the task's own metric is the mean over classes (FGVC Aircraft ...; specification D1.4), that one too.
    """
    if not task.trains_probe:
        return
    train, val, test = (labelled(view, task, split) for split in (task.train, task.val, task.test))
    chosen = choose(train, val, view.device)
    classes = len(classes_of(task))
    hits = chosen.fit.predict(test.vectors) == test.labels
    top1 = scored(
        view,
        hits,
        task=task.name,
        evaluator="linear",
        metric="top1",
        chance=1 / classes,
        split=task.test.name,
        feature_point=view.feature_point,
        data=content_hash([train.data, val.data, test.data]),
        note=join_notes(train.note, val.note, test.note, chosen.note),
        extra={
            "strength": chosen.strength,
            "val_top1": chosen.val_top1,
            "classes": classes,
            "commonest": rate_of_commonest(torch.cat([train.labels, val.labels]), test.labels),
        },
    )
    yield top1
    if "mean_class" in task.metrics and "top1" not in task.metrics:
        mean = class_interval(hits, test.labels)
        extra = {name: top1.extra[name] for name in ("seed", "strength", "val_top1", "classes")}
        yield replace(top1, metric="mean_class", value=mean.value, low=mean.low, high=mean.high, extra=extra)


@dataclass(frozen=True)
class Chosen:
    """The probe at the strength that did best on the validation samples, fitted to them and the training samples."""

    fit: Fit
    strength: float
    val_top1: float
    note: str


def choose(train: Labelled, val: Labelled, device: torch.device | str = "cpu") -> Chosen:
    """Return the probe whose strength is chosen on `val`, refitted on `train` and `val`."""
    probe = Probe(train.vectors, train.labels, device)
    accuracies = sweep(lambda strength: _accuracy(probe.fit(strength), val))
    exponent = _peak(accuracies)
    vectors, labels = torch.cat([train.vectors, val.vectors]), torch.cat([train.labels, val.labels])
    fit = Probe(vectors, labels, device).fit(10**exponent)
    edge = "the best L2 strength lies at the end of the range" if abs(exponent) == max(COARSE) else ""
    short = "" if fit.converged else f"the last fit stopped after {fit.iterations} iterations, short of its tolerance"
    return Chosen(fit, 10**exponent, accuracies[exponent], join_notes(edge, short))


def sweep(accuracy: Callable[[float], float]) -> dict[float, float]:
    """Return exponent -> `accuracy(10**exponent)` of the coarse-to-fine search.

    From `COARSE`, the step is halved around the best exponent until it is `FINEST_STEP`.
    """
    found = {float(exponent): accuracy(10.0**exponent) for exponent in COARSE}
    step = 2.0
    while step > FINEST_STEP:
        step /= 2
        peak = _peak(found)
        for exponent in (peak + step, peak - step):
            if abs(exponent) <= max(COARSE) and exponent not in found:
                found[exponent] = accuracy(10.0**exponent)
    return found


def _peak(accuracies: dict[float, float]) -> float:
    """Return the exponent of the highest accuracy; of equals, the strongest."""
    return max(accuracies, key=lambda exponent: (accuracies[exponent], exponent))


@dataclass(frozen=True)
class Fit:
    """A fitted linear classifier in the features' own coordinates.

    weight (D, K) and bias (K,): fp64. classes (K,): ids of the classes in the training data, in the order of K.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    iterations: int
    converged: bool

    def predict(self, vectors: Tensor) -> Tensor:
        """Return the class ids (n,) of features (n, D)."""
        return self.classes[(vectors.double() @ self.weight + self.bias).argmax(dim=1)]


def _accuracy(fit: Fit, split: Labelled) -> float:
    return float((fit.predict(split.vectors) == split.labels).double().mean())


class Probe:
    """Logistic regression on one training set at many strengths; each fit starts from the nearest stronger one.

    Args:
        vectors: features (n, D). labels: class ids (n,); only classes that occur are fitted. device: where to compute.
    """

    def __init__(self, vectors: Tensor, labels: Tensor, device: torch.device | str = "cpu") -> None:
        self.classes, self.targets = labels.unique(return_inverse=True)
        self.targets = self.targets.to(device)
        self.n, self.k = len(labels), len(self.classes)
        self.mean = vectors.double().mean(dim=0)
        centred = vectors.double() - self.mean
        spread, axes = torch.linalg.eigh(centred.T @ centred / self.n)
        # Directions whose variance is below the rounding of fp32 features carry no information and get weight 0.
        used = spread > 1e-14 * (spread.sum() + self.mean.square().sum())
        self.rotated = (centred @ axes[:, used]).float().to(device)
        self.mean, self.spread, self.axes = self.mean.to(device), spread[used].to(device), axes[:, used].to(device)
        self.solutions: dict[float, Tensor] = {}

    def fit(self, strength: float) -> Fit:
        """Return the minimum at an L2 `strength` (scikit-learn's 1 / C)."""
        # At equal probabilities the softmax has curvature (K - 1) / K^2 in each logit.
        curvature = max((self.k - 1) / self.k**2, 1e-12)
        scale = (curvature * self.spread + strength / self.n).rsqrt()
        scale = torch.cat([scale, scale.new_full((1,), curvature**-0.5)])[:, None]
        point = (self._start(strength) / scale).requires_grad_()
        search = torch.optim.LBFGS(
            [point],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        objective = self._objective(point, scale, strength)
        search.step(objective)
        objective()
        converged = point.grad is not None and bool(point.grad.abs().max() <= TOLERANCE)
        solution = point.detach() * scale
        self.solutions[strength] = solution
        weight = self.axes @ solution[:-1]
        bias = solution[-1] - self.mean @ weight
        return Fit(weight.cpu(), bias.cpu(), self.classes, int(search.state[point]["n_iter"]), converged)

    def _start(self, strength: float) -> Tensor:
        """Return the solution (rank + 1, K) of the nearest stronger fit, the bias in the last row; zeros if none."""
        stronger = [s for s in self.solutions if s >= strength]
        if stronger:
            return self.solutions[min(stronger)]
        return torch.zeros(len(self.spread) + 1, self.k, dtype=torch.float64, device=self.rotated.device)

    def _objective(self, point: Tensor, scale: Tensor, strength: float) -> Callable[[], float]:
        """Return a function that computes the objective / n at `point` (scaled coordinates) and sets its gradient."""
        scaled = self.rotated * scale[:-1, 0].float()
        penalty = strength / self.n * scale[:-1].square()
        rows = torch.arange(self.n, device=scaled.device)

        # The products with the features are fp32; what is added up over samples and iterations is fp64.
        @torch.no_grad()
        def evaluate() -> float:
            weight, bias = point[:-1], point[-1] * scale[-1]
            log_p = F.log_softmax(torch.addmm(bias.float(), scaled, weight.float()), dim=1)
            value = 0.5 * (penalty * weight.square()).sum() - log_p[rows, self.targets].double().mean()
            residual = log_p.exp_()
            residual[rows, self.targets] -= 1
            gradient = (scaled.T @ residual).double() / self.n + penalty * weight
            point.grad = torch.cat([gradient, residual.double().mean(dim=0, keepdim=True) * scale[-1]])
            return value.item()

        return evaluate
