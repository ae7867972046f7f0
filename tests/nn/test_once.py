"""Computing once: the very same tensors are answered from memory, within the block alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from altsight.nn.once import Once


class Counting(Once):
    """Adds, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.weight * (x if y is None else x + y)


def test_the_same_tensors_are_computed_once_within_the_block() -> None:
    module, x, y = Counting(), torch.ones(2), torch.ones(2)
    with module.once():
        first = module(x, y)
        assert module(x, y) is first and module(x, y=y) is first and module(y=y, x=x) is first
        assert module.calls == 1
        assert module(y, x) is not first and module(x) is not first and module.calls == 3
        assert module(x, None) is module(x) and module.calls == 3
        # Equal, but not the same.
        assert module(x.clone(), y) is not first and module.calls == 4
    assert module(x, y) is not first and module.calls == 5


def test_ids_of_tensors_that_are_gone_do_not_pass_to_others() -> None:
    module = Counting()
    with module.once():
        results = [module(torch.full((2,), float(i)))[0].item() for i in range(50)]
    assert results == list(range(50))


def test_what_has_no_gradient_does_not_stand_in_for_what_has() -> None:
    module, x = Counting(), torch.ones(2)
    with module.once():
        with torch.no_grad():
            assert not module(x).requires_grad
        assert module(x).requires_grad and module.calls == 2


def test_other_results_are_remembered_by_name_and_an_error_ends_the_block() -> None:
    module, x = Counting(), torch.ones(2)
    with pytest.raises(ZeroDivisionError), module.once():
        doubled = module.remembered(lambda x: 2 * x, "double", {"x": x})
        assert module.remembered(lambda x: 3 * x, "double", {"x": x}) is doubled
        assert module.remembered(lambda x: 3 * x, "triple", {"x": x})[0] == 3
        raise ZeroDivisionError
    assert module.remembered(lambda x: 3 * x, "double", {"x": x})[0] == 3


def test_it_is_copied_and_pickled_as_any_module() -> None:
    module = Counting()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(torch.ones(2)).tolist() == [1, 1] and twin.calls == 1
