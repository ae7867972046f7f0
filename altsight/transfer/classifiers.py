"""Class matrices (C, E) that a classifier of unit vectors starts from, or keeps (Text4Vis; specification 4.1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key

ClassifierInit = Literal["text", "lda", "orthogonal", "normal"]
"""text: vectors of the class names; lda: discriminants of labelled frozen vectors; orthogonal, normal: random."""


def orthogonal(classes: int, width: int, seed: int) -> Tensor:
    """Return the first rows of a random orthogonal matrix (width, width): the Q of a normal matrix.

    Raises:
        UserError: there are more classes than dimensions.
    """
    if classes > width:
        raise UserError(f"{classes} classes cannot be orthogonal in {width} dimensions: use --init text or normal.")
    drawn = key(seed, 0, "orthogonal classifier").generator().normal(size=(width, width))
    return torch.from_numpy(np.linalg.qr(drawn)[0][:classes]).float()


def normal(classes: int, width: int, seed: int) -> Tensor:
    """Return a matrix of draws from N(0, 1)."""
    drawn = key(seed, 0, "normal classifier").generator().normal(size=(classes, width))
    return torch.from_numpy(drawn).float()


def discriminants(vectors: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the coefficients of a linear discriminant analysis of unit vectors (n, E) with class ids (n,).

    The within-class covariance is shrunk by Ledoit and Wolf's formula, as there may be fewer vectors than dimensions.

    Raises:
        UserError: a class has no vector.
    """
    if len(labels.unique()) < classes:
        raise UserError(f"{classes - len(labels.unique())} of {classes} classes have no video that decodes.")
    analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    analysis.fit(F.normalize(vectors.double(), dim=-1).numpy(), labels.numpy())
    rows = torch.from_numpy(analysis.coef_).float()
    # Two classes share one row: the second class's, and against the first.
    return torch.cat([-rows, rows]) if classes == 2 else rows
