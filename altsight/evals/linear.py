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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.evals.base import Result, Task, View
from altsight.evals.bootstrap import scored
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
    """Yield the top-1 accuracy of the linear probe: strength chosen on val, refitted on train + val, scored on test."""
    if not task.label:
        return
    train, val, test = (labelled(view, task, split) for split in (task.train, task.val, task.test))
    probe = Probe(train.vectors, train.labels, view.device)
    accuracies = sweep(lambda strength: _accuracy(probe.fit(strength), val))
    exponent = _peak(accuracies)
    vectors, labels = torch.cat([train.vectors, val.vectors]), torch.cat([train.labels, val.labels])
    fit = Probe(vectors, labels, view.device).fit(10**exponent)
    classes = len(classes_of(task))
    edge = "the best L2 strength lies at the end of the range" if abs(exponent) == max(COARSE) else ""
    capped = "" if fit.converged else f"the last fit stopped at the cap of {MAX_ITERATIONS} iterations"
    yield scored(
        view,
        fit.predict(test.vectors) == test.labels,
        task=task.name,
        evaluator="linear",
        metric="top1",
        chance=1 / classes,
        split=task.test.name,
        feature_point=view.feature_point,
        data=content_hash([train.data, val.data, test.data]),
        note=join_notes(train.note, val.note, test.note, edge, capped),
        extra={
            "strength": 10**exponent,
            "val_top1": accuracies[exponent],
            "classes": classes,
            "commonest": rate_of_commonest(labels, test.labels),
        },
    )


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
        self.spread, self.axes = spread[used], axes[:, used]
        self.rotated = (centred @ self.axes).float().to(device)
        self.solutions: dict[float, tuple[Tensor, Tensor]] = {}

    def fit(self, strength: float) -> Fit:
        """Return the minimum at an L2 `strength` (scikit-learn's 1 / C)."""
        from scipy.optimize import minimize

        # At equal probabilities the softmax has curvature (K - 1) / K^2 in each logit.
        curvature = (self.k - 1) / self.k**2
        scale = (curvature * self.spread + strength / self.n).rsqrt()
        bias_scale = max(curvature, 1e-12) ** -0.5
        weight, bias = self._start(strength)
        start = torch.cat([weight / scale[:, None], bias[None] / bias_scale])
        found = minimize(
            self._objective(strength, scale, bias_scale),
            start.flatten().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0, "maxfun": 2 * MAX_ITERATIONS},
        )
        solution = torch.from_numpy(found.x).view_as(start)
        weight, bias = solution[:-1] * scale[:, None], solution[-1] * bias_scale
        self.solutions[strength] = (weight, bias)
        raw = self.axes @ weight
        return Fit(raw, bias - self.mean @ raw, self.classes, int(found.nit), bool(found.success))

    def _start(self, strength: float) -> tuple[Tensor, Tensor]:
        stronger = [s for s in self.solutions if s >= strength]
        if stronger:
            return self.solutions[min(stronger)]
        return torch.zeros(len(self.spread), self.k, dtype=torch.float64), torch.zeros(self.k, dtype=torch.float64)

    def _objective(
        self, strength: float, scale: Tensor, bias_scale: float
    ) -> Callable[[npt.NDArray[np.float64]], tuple[float, npt.NDArray[np.float64]]]:
        """Return the objective / n and its gradient as a function of the scaled coordinates, flat."""
        device = self.rotated.device
        scaled = self.rotated * scale.float().to(device)
        penalty = (strength / self.n * scale.square())[:, None]

        def evaluate(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            point = torch.from_numpy(flat).view(-1, self.k)
            weight, bias = point[:-1], point[-1] * bias_scale
            logits = torch.addmm(bias.float().to(device), scaled, weight.float().to(device))
            log_p = F.log_softmax(logits, dim=1)
            picked = log_p.gather(1, self.targets[:, None])
            value = -picked.double().mean().item() + 0.5 * (penalty * weight.square()).sum().item()
            residual = log_p.exp_()
            residual[torch.arange(self.n, device=device), self.targets] -= 1
            gradient = torch.empty_like(point)
            gradient[:-1] = (scaled.T @ residual).cpu().double() / self.n + penalty * weight
            gradient[-1] = residual.double().sum(dim=0).cpu() * (bias_scale / self.n)
            return value, gradient.flatten().numpy()

        return evaluate
