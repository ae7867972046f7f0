"""What a recipe costs: counted as a run counts it, carried on to the encoder's depth, and kept in costs.toml."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from altsight.core.types import Batch
from altsight.data.prepared import Prepared
from altsight.methods.base import Corpus
from altsight.recipes import recipe
from altsight.recipes.cost import Cost, Machine, _batch, measure, stored
from altsight.recipes.library import STUDIES, recipes
from altsight.train.account import flops_per_sample
from altsight.train.run import Run, build


def direct(run: Run[Any], corpus: Corpus) -> tuple[float, int, int]:
    """Return FLOPs, parameters and trained parameters of the method at its own depth, without any carrying on."""
    method = build(run, corpus)
    numbers = [p.numel() for p in method.parameters()]
    trained = [p.numel() for p in method.parameters() if p.requires_grad]
    return flops_per_sample(method, _batch(method, run, "pairs")), sum(numbers), sum(trained)


@pytest.mark.parametrize("name", ["sample_clip", "sample_mae"])
def test_what_is_carried_on_to_the_depth_is_what_is_counted_there(name: str, sample_data: Prepared) -> None:
    run = recipe(name)
    cost = measure(run, vocabulary=2048)
    assert run.encoder.depth == 4
    expected = direct(run, Corpus.of(sample_data))
    assert sample_data.tokenizer is not None and sample_data.tokenizer.vocab_size == 2048
    assert (cost.flops, cost.parameters, cost.trained) == expected


def test_memory_is_state_and_what_the_graph_keeps(sample_data: Prepared) -> None:
    run = recipe("sample_mae")
    cost = measure(run)
    # AdamW: weight, gradient and two moments in fp32; a table that is not trained is only held.
    assert cost.state == 16 * cost.trained + 4 * (cost.parameters - cost.trained)
    assert cost.memory(10) - cost.memory(4) == 6 * cost.activations > 0
    # Of each map's weight the graph keeps a bf16 copy, and little else that does not grow with the batch.
    assert 2 * 0.9 * cost.trained < cost.casts < 2 * 1.1 * cost.trained
    momentum = dataclasses.replace(run, optim=dataclasses.replace(run.optim, name="momentum"))
    assert measure(momentum).state == cost.state - 4 * cost.trained


def test_activations_are_what_a_pass_by_hand_keeps() -> None:
    """slow reference: one linear map and a ReLU, whose saved tensors can be counted on the fingers."""
    from altsight.core.types import Outputs
    from altsight.methods.base import Method
    from altsight.recipes.cost import _saved

    class Toy(Method):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.map = torch.nn.Linear(64, 32, bias=False)

        def embed(self, batch: Batch, at: Any) -> Outputs:
            return Outputs(local={"sum": self.map(batch["x"]).relu().sum()})

    for n in (2, 4):
        places = torch.arange(n)
        kept = _saved(Toy(), Batch({"x": torch.randn(n, 64, dtype=torch.bfloat16)}, places, places))
        # The input of the map and the output of the ReLU for each sample; the weight in bf16 once.
        assert kept in (n * (64 * 2 + 32 * 2), n * (64 * 2 + 32 * 2) + 64 * 32 * 2)


def test_hours() -> None:
    assert Machine(peak=1e12, utilisation=0.5).hours(1.8e15) == pytest.approx(1.0)
    assert Machine().hours(989e12 * 0.4 * 3600) == pytest.approx(1.0)


@pytest.mark.parametrize("arm", ["clip", "mae", "mug"])
def test_what_is_kept_is_current(arm: str) -> None:
    plan = STUDIES["study_sample"].plan
    assert plan.source is not None
    run = plan.run(arm, 0, plan.train.batch)
    assert_current(stored()["study_sample"][arm], measure(run, vocabulary=plan.source.vocab_size))


def test_what_is_kept_of_a_recipe_is_current() -> None:
    found = recipes()["simmim_b16_imagenet"]
    assert_current(stored()["recipes"][found.name], measure(found.run(), kind="images", classes=1000))


def assert_current(kept: Cost, now: Cost) -> None:
    """The count is exact; what a graph keeps may change a little with torch."""
    assert (kept.flops, kept.parameters, kept.trained) == (now.flops, now.parameters, now.trained), (
        "python -m bench.recipes"
    )
    assert kept.memory(64) == pytest.approx(now.memory(64), rel=0.05)


def test_everything_is_counted() -> None:
    counted = {group: set(costs) for group, costs in stored().items()}
    wanted = {name: set(study.plan.arms) for name, study in STUDIES.items()}
    assert counted == wanted | {"recipes": set(recipes())}, "run `python -m bench.recipes`"


def test_sizes_are_those_of_the_papers() -> None:
    """Parameters that the sources state (specification 0.2, mug_lcl 2.2), in millions."""
    published = {
        "clip_b32_wit400m": 151.28,
        "clip_b16_wit400m": 149.62,
        "clip_l14_wit400m": 427.62,
        "lcl_b16_laion400m": 249.92,
        "lcl_b32_laion400m": 177.66,
        "lcl_b32_mmc4": 178.64,
    }
    for name, millions in published.items():
        assert stored()["recipes"][name].parameters / 1e6 == pytest.approx(millions, rel=2e-3), name
