"""Losses and targets of self-distillation against loops over the formulas, in one process and over two ranks."""

from __future__ import annotations

import math
import os
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from altsight.core import dist
from altsight.core.types import Progress
from altsight.losses.self_distillation import TargetConfig, Targets, masked_ce_sum, sinkhorn, view_ce


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def slow_ce(student: list[float], target: list[float], temperature: float) -> float:
    chances = slow_softmax([s / temperature for s in student])
    return -sum(t * math.log(c) for t, c in zip(target, chances, strict=True))


def test_view_ce_equals_reference() -> None:
    student, targets = random(3, 5, 7), random(3, 2, 7, seed=1).softmax(-1)
    got = view_ce(student, targets, 0.1)
    for sample in range(3):
        terms = [
            slow_ce(student[sample, v].tolist(), targets[sample, t].tolist(), 0.1)
            for t in range(2)
            for v in range(5)
            if t != v
        ]
        assert len(terms) == 8
        assert got[sample].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_without_local_views_each_global_one_predicts_the_other() -> None:
    student, targets = random(2, 2, 6), random(2, 2, 6, seed=1).softmax(-1)
    swapped = -(targets.flip(1) * (student / 0.1).log_softmax(-1)).sum(-1).mean(1)
    torch.testing.assert_close(view_ce(student, targets, 0.1), swapped)


def test_masked_ce_equals_reference() -> None:
    counts = [3, 1, 4]  # masked patches of three crops
    masked = torch.tensor([n for n in counts for _ in range(n)])
    student, targets = random(8, 6), random(8, 6, seed=1).softmax(-1)
    row, total = 0, 0.0
    for n in counts:
        total += sum(slow_ce(student[row + i].tolist(), targets[row + i].tolist(), 0.1) for i in range(n)) / n
        row += n
    assert masked_ce_sum(student, targets, masked, 0.1).item() == pytest.approx(total, rel=1e-5)


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 6, requires_grad=True)
    loss = masked_ce_sum(student, torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def targets_of(kind: str, prototypes: int = 6, temperature: float = 0.05) -> Targets:
    config = TargetConfig(kind, temperature=(temperature, temperature))
    targets = Targets(config, prototypes)
    targets.reset_parameters()
    return targets


def test_centred_targets_and_their_centre_equal_reference() -> None:
    targets, centre = targets_of("softmax"), [0.0] * 6
    for step in range(3):
        logits = random(4, 2, 6, seed=step).requires_grad_()
        got = targets(logits)
        assert not got.requires_grad
        for sample in range(4):
            for view in range(2):
                scores = [(x - c) / 0.05 for x, c in zip(logits[sample, view].tolist(), centre, strict=True)]
                assert got[sample, view].tolist() == pytest.approx(slow_softmax(scores), rel=1e-4, abs=1e-7)
        assert targets.centre.tolist() == pytest.approx(centre, rel=1e-5), "the centre waits for the step"
        targets.follow()
        means = [sum(logits[s, v, k].item() for s in range(4) for v in range(2)) / 8 for k in range(6)]
        centre = [0.9 * c + 0.1 * m for c, m in zip(centre, means, strict=True)]
        assert targets.centre.tolist() == pytest.approx(centre, rel=1e-5)
    targets.follow()
    assert targets.centre.tolist() == pytest.approx(centre, rel=1e-5), "one batch moves it once"


def test_centre_can_follow_other_logits_than_the_targets() -> None:
    targets, seen = targets_of("softmax"), random(5, 6, seed=1)
    expected = (random(3, 6) / 0.05).softmax(-1)
    torch.testing.assert_close(targets(random(3, 6), seen), expected)
    targets.follow()
    torch.testing.assert_close(targets.centre, 0.1 * seen.mean(0))


def test_centre_stays_where_no_rows_were_seen() -> None:
    targets = targets_of("softmax")
    targets.centre.fill_(3.0)
    assert targets(torch.zeros(0, 6)).shape == (0, 6)
    targets.follow()
    assert targets.centre.tolist() == [3.0] * 6


def test_uncentred_targets_have_no_centre() -> None:
    targets, logits = targets_of("none"), random(3, 2, 6)
    torch.testing.assert_close(targets(logits), (logits / 0.05).softmax(-1))
    targets.follow()
    assert not targets.centre.any()


def test_temperature_warms_up() -> None:
    targets = Targets(TargetConfig(temperature=(0.04, 0.07), warmup=0.5), 6)
    got = []
    for step in (0, 25, 50, 99):
        targets.start_step(Progress(step, 100))
        got.append(targets.temperature)
    assert got == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_report_tells_a_collapse() -> None:
    targets = targets_of("none", prototypes=8)
    said_nothing, one_prototype, healthy = torch.zeros(8, 8), torch.zeros(8, 8), 10 * torch.eye(8)
    one_prototype[:, 3] = 10
    for logits, target, prototype in (
        (said_nothing, math.log(8), math.log(8)),
        (one_prototype, 0, 0),
        (healthy, 0, math.log(8)),
    ):
        targets(logits)
        report = targets.report()
        assert report["target_entropy"] == pytest.approx(target, abs=1e-4)
        assert report["prototype_entropy"] == pytest.approx(prototype, abs=1e-4)


def slow_sinkhorn(logits: Tensor, iterations: int = 3) -> list[list[float]]:
    """The matrix form of DINOv2, prototype by prototype and sample by sample, in double precision."""
    q = [[math.exp(x) for x in row] for row in logits.double().tolist()]
    n, k = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        used = [sum(q[i][j] for i in range(n)) for j in range(k)]
        q = [[q[i][j] / used[j] / k for j in range(k)] for i in range(n)]
        q = [[x / sum(row) / n for x in row] for row in q]
    return [[x * n for x in row] for row in q]


def test_sinkhorn_equals_reference() -> None:
    logits = random(9, 5) / 0.5
    torch.testing.assert_close(sinkhorn(logits), torch.tensor(slow_sinkhorn(logits)), rtol=1e-4, atol=1e-6)


def test_sinkhorn_sums() -> None:
    q = sinkhorn(random(64, 16))
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((16,), 64 / 16), rtol=0.1, atol=0)
    exact = sinkhorn(random(64, 16) / 0.3, iterations=100)
    torch.testing.assert_close(exact.sum(0), torch.full((16,), 64 / 16), rtol=1e-4, atol=0)


def test_sinkhorn_uses_prototypes_more_evenly_than_softmax() -> None:
    """Biased logits, as in specification 2.9; usage relative to an even one."""
    bias = torch.linspace(-0.15, 0.15, 32)
    logits = (0.06 * random(512, 32) + bias) / 0.07
    even, biased = (p.mean(0) * 32 for p in (sinkhorn(logits), logits.softmax(-1)))
    assert even.min() > 0.7 and even.max() < 1.3
    assert biased.min() < 0.2 and biased.max() > 3


def test_sinkhorn_neither_overflows_nor_underflows() -> None:
    logits = random(6, 4) * 1000
    logits[:, 2] -= 1e5
    q = sinkhorn(logits)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(6))


ROWS = random(11, 6, seed=5) / 0.1
SPLITS = ((7, 4), (11, 0))


def _rank(rank: int, store: str, results: SimpleQueue[Any]) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.start(torch.device("cpu"))
    found = []
    for split in SPLITS:
        mine = ROWS.split(split)[rank]
        centred = targets_of("softmax")
        centred(mine)
        centred.follow()
        found.append((sinkhorn(mine).numpy(), centred.centre.numpy()))
    results.put((rank, found))
    dist.barrier()
    dist.stop()


def test_ranks_with_other_numbers_of_rows_compute_what_one_does(tmp_path: Path) -> None:
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
    ranks = [found for _, found in sorted((results.get() for _ in range(2)), key=lambda result: result[0])]
    for case in range(len(SPLITS)):
        (first, centre), (second, other) = (found[case] for found in ranks)
        together = torch.cat([torch.from_numpy(first), torch.from_numpy(second)])
        torch.testing.assert_close(together, sinkhorn(ROWS), rtol=1e-4, atol=1e-6)
        for got in (centre, other):
            torch.testing.assert_close(torch.from_numpy(got), 0.1 * ROWS.mean(0))
    alone = sinkhorn(ROWS[:7])
    assert not torch.allclose(alone, sinkhorn(ROWS)[:7], rtol=1e-2), "ranks matter here"
