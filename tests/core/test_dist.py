"""The process group, on two real processes."""

from __future__ import annotations

import os
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.multiprocessing as mp

from altsight.core import dist


def _rank(rank: int, store: str, results: SimpleQueue[Any]) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    place = dist.start(torch.device("cpu"))
    x = torch.full((1, 2), float(rank + 1), requires_grad=True)
    everything = dist.gather(x)
    # Each rank's share of the global loss sum_i (i + 1) * everything[i]^2 is what its own row contributes.
    ((rank + 1) * everything[rank].square().sum() + everything.sum()).backward()
    assert x.grad is not None
    results.put(
        (
            (place.rank, place.size, place.is_main),
            everything.tolist(),
            x.grad.tolist(),
            dist.sum_over_ranks(torch.tensor(rank + 1.0)).item(),
            (dist.any_rank(rank == 1), dist.any_rank(False)),
            dist.gather_objects({"rank": rank}),
        )
    )
    dist.barrier()
    dist.stop()


def test_two_ranks(tmp_path: Any) -> None:
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    (place0, all0, grad0, *rest0), (place1, all1, grad1, *rest1) = sorted(results.get() for _ in range(2))
    assert (place0, place1) == ((0, 2, True), (1, 2, False))
    assert all0 == all1 == [[1.0, 1.0], [2.0, 2.0]]
    # d/dx of 1 * x0^2 + 2 * x1^2 + 2 * (x0 + x1) at x0 = 1, x1 = 2.
    assert (grad0, grad1) == ([[4.0, 4.0]], [[10.0, 10.0]])
    assert rest0 == rest1 == [3.0, (True, False), [{"rank": 0}, {"rank": 1}]]


def test_a_single_process_needs_no_group() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert dist.world() == dist.World(0, 1, 0)
    assert dist.gather(x) is x
    assert dist.sum_over_ranks(x) is x
    assert (dist.any_rank(True), dist.any_rank(False)) == (True, False)
    assert dist.gather_objects("a") == ["a"]
