"""Batch norm over ranks, heads and teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from altsight.core.rng import key, torch_seeded
from altsight.nn.heads import GlobalBatchNorm, MLPHead, PrototypeHead
from altsight.nn.init import reset
from altsight.nn.momentum import Teacher


def test_batch_norm_is_torchs() -> None:
    torch.manual_seed(0)
    x = (torch.randn(16, 5) * 3 + 100).requires_grad_()
    ours = GlobalBatchNorm(5)
    reset(ours)
    theirs = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-4)
    weights = torch.randn(16, 5)
    (got,) = torch.autograd.grad((ours(x) * weights).sum(), x)
    (want,) = torch.autograd.grad((theirs * weights).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("last", "columns"), [("none", 0), ("affine", 2), ("plain", 0)])
def test_mlp_head(last: str, columns: int) -> None:
    head = MLPHead((4, 8, 8, 3), last_norm=last)  # type: ignore[arg-type]
    reset(head)
    out = head(torch.randn(6, 4))
    assert out.shape == (6, 3)
    if last == "plain":
        torch.testing.assert_close(out.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-5)
    maps = 4 * 8 + 2 * 8 + 8 * 8 + 2 * 8 + 8 * 3
    assert sum(p.numel() for p in head.parameters()) == maps + 3 * columns + 3 * (last == "none")


def test_prototype_head() -> None:
    head = PrototypeHead(4, 8, 3, 10)
    with torch_seeded(key(0, 0)):
        reset(head)
    z = head(torch.randn(5, 4))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))
    logits = head.logits(z)
    unit = head.direction / head.direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits, z @ unit.T)
    assert not head.length.requires_grad and PrototypeHead(4, 8, 3, 10, trained_norm=True).length.requires_grad
    torch.testing.assert_close(head.logits(z, frozen=True), logits)
    (grad,) = torch.autograd.grad(head.logits(z, frozen=True).square().sum(), head.direction)
    assert not grad.any()


def test_teacher_follows() -> None:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    teacher = Teacher({"net": student})
    before = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight.add_(1)
    teacher.follow({"net": student}, 1.0)
    assert torch.equal(teacher["net"][0].weight, before)
    teacher.follow({"net": student}, 0.9)
    torch.testing.assert_close(teacher["net"][0].weight, before + 0.1)
    teacher.follow({"net": student}, 0.0)
    torch.testing.assert_close(teacher["net"][0].weight, student[0].weight)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train()["net"].training
    assert Teacher({"net": student}, follows_mode=True).train()["net"].training
