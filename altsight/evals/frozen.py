"""One frozen classifier for clean and changed images: zero-shot with a text tower, a linear probe otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from altsight.evals.base import Split, Task, View
from altsight.evals.features import Labelled, classes_of, joint_vectors, labelled
from altsight.evals.linear import choose
from altsight.evals.zeroshot import class_vectors, names_of


@dataclass(frozen=True)
class FrozenClassifier:
    """Scores for the labels `classes` of a task: vectors @ weight + bias.

    kind: "zeroshot" reads the vectors in the joint space, "linear" the features. weight: (D, K). bias: (K,).
    """

    kind: Literal["zeroshot", "linear"]
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def hits(self, view: View, task: Task, split: Split) -> tuple[Tensor, Labelled]:
        """Return which samples (n,) of `split` it answers rightly, among the classes of `task`, and these samples.

        All classes of the task must be among `classes`.
        """
        columns = torch.tensor([self.classes.index(label) for label in classes_of(task)])
        test = labelled(view, task, split)
        vectors = joint_vectors(view, split)[list(test.rows)] if self.kind == "zeroshot" else test.vectors
        scores = vectors.double() @ self.weight[:, columns] + self.bias[columns]
        return scores.argmax(dim=1) == test.labels, test


NO_PROBE = ", and the task no images to train a probe on"


def answerable(view: View, task: Task) -> bool:
    """Return whether `view` can answer the task: by a text tower, or by a probe on its training images."""
    return view.is_dual or task.trains_probe


def frozen_classifier(view: View, task: Task) -> FrozenClassifier:
    """Return the classifier of `view` for the classes of `task`, which must be `answerable`."""
    classes = classes_of(task)
    if view.is_dual:
        weight = class_vectors(view, names_of(task), task.prompts).T.double()
        return FrozenClassifier("zeroshot", weight, torch.zeros(len(classes), dtype=torch.float64), classes)
    train, val = (labelled(view, task, split) for split in (task.train, task.val))
    fit = choose(train, val, view.device).fit
    # A class that no training image has is never answered.
    weight = fit.weight.new_zeros(len(fit.weight), len(classes))
    bias = fit.bias.new_full((len(classes),), -torch.inf)
    weight[:, fit.classes], bias[fit.classes] = fit.weight, fit.bias
    return FrozenClassifier("linear", weight, bias, classes)
