"""Many ways to ask for the same classes: which wording is used moves a zero-shot result by tens of points.

MI-Zero therefore draws 50 sets of prompts once, stores them, and reports the median over them (specification 1.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.config import from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.base import View
from altsight.evals.templates import check_prompts


@dataclass(frozen=True)
class PromptSet:
    """Templates with one `{}` each, and the names of every class that are put into them."""

    templates: tuple[str, ...]
    names: dict[str, tuple[str, ...]]

    def texts(self, label: str) -> list[str]:
        """Return the prompts of a class: every name in every template."""
        return [template.replace("{}", name) for name in self.names[label] for template in self.templates]


@dataclass(frozen=True)
class PromptBank:
    """Sets of prompts for the same classes."""

    sets: tuple[PromptSet, ...]

    def save(self, path: Path) -> None:
        """Write the sets as JSON, so that other models are asked in the same words."""
        write_json(path, to_dict(self))


def draw_bank(templates: Sequence[str], classes: Mapping[str, Sequence[str]], count: int, seed: int) -> PromptBank:
    """Return `count` sets; each has 1 or more of the templates (the number is uniform) and one name for every class.

    Raises:
        UserError: a template has no place for the name, or there is none.
    """
    check_prompts(tuple(templates))
    if count < 1:
        raise UserError(f"{count} sets of prompts ask nothing: use --sets 1 or more.")
    sets = []
    for number in range(count):
        rng = key(seed, number, "prompts").generator()
        chosen = rng.permutation(len(templates))[: rng.integers(1, len(templates) + 1)].tolist()
        names: dict[str, tuple[str, ...]] = {
            label: (found[int(rng.integers(len(found)))],) for label, found in classes.items()
        }
        sets.append(PromptSet(tuple(templates[i] for i in chosen), names))
    return PromptBank(tuple(sets))


def read_bank(path: Path, classes: Sequence[str]) -> PromptBank:
    """Read what `PromptBank.save` wrote.

    Raises:
        UserError: it is damaged, or its sets are for other classes.
    """
    bank = from_dict(read_json(path), PromptBank, str(path))
    for found in bank.sets:
        check_prompts(found.templates, f"'{path}': ")
        if set(found.names) != set(classes) or not all(found.names.values()):
            raise UserError(f"the prompts in '{path}' are for other classes: draw new ones, or give their class file.")
    if not bank.sets:
        raise UserError(f"'{path}' holds no set of prompts: draw new ones.")
    return bank


def class_vectors(view: View, sets: Sequence[PromptSet], classes: Sequence[str]) -> Tensor:
    """Return unit vectors (sets, C, E): the normalised mean of the unit vectors of a class's prompts in each set.

    Every text is encoded once, in however many sets it is.
    """
    wanted = [[found.texts(label) for label in classes] for found in sets]
    texts = list(dict.fromkeys(text for found in wanted for prompts in found for text in prompts))
    vectors, row = view.encode_text(texts), {text: i for i, text in enumerate(texts)}
    means = [vectors[[row[text] for text in prompts]].mean(dim=0) for found in wanted for prompts in found]
    return F.normalize(torch.stack(means), dim=-1).unflatten(0, (len(sets), len(classes)))
