"""iBOT: both losses against a slow reference, what the student sees, its masks and its centres."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.multicrop import dino_views
from altsight.data.views import Crop
from altsight.losses.self_distillation import TargetConfig
from altsight.methods.base import Corpus
from altsight.methods.dino import DINO, HeadConfig
from altsight.methods.ibot import IBOT, IBOTPrepare
from altsight.nn.encoder import Encoder
from altsight.train.optim import parameter_groups
from tests.methods.distillation import batch_of, slow_ce, slow_logits, slow_softmax, slow_view_loss, stir, view

CONFIG = IBOT.Config(
    views=dino_views((0.25, 1.0), (0.05, 0.25), 2),
    head=HeadConfig(hidden=24, bottleneck=8, prototypes=12),
    patch_targets=TargetConfig(temperature=(0.06, 0.07)),
)


def build(encoder: Encoder, corpus: Corpus) -> IBOT:
    method = IBOT(CONFIG, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    stir(method, (method.targets.centre, method.patch_targets.centre))
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> IBOT:
    return build(encoder, corpus)


@pytest.fixture
def views(method: IBOT, document: Callable[..., Document]) -> Batch:
    """Three samples with some views masked and some not."""
    batch = batch_of(method, document)
    masked = batch["mask"].any(-1)
    assert masked.any() and not masked.all()
    return batch


@torch.no_grad()
def slow_losses(method: IBOT, batch: Batch) -> tuple[float, float]:
    encoder, teacher, head = method.encoder, method.teacher["encoder"], method.teacher["head"]
    students, targets, patches = [], [], 0.0
    for sample in range(len(batch)):
        seen, told = [], []
        for i in range(2):
            image, mask = view(encoder, batch, sample, i), batch["mask"][sample, i]
            here = encoder(image, mask=mask[None], mask_token=method.mask_token[0]).tokens[0]
            there = teacher(image).tokens[0]
            seen.append(slow_logits(method.head, here[0]))
            told.append(slow_softmax(slow_logits(head, there[0]), 0.04, method.targets.centre.tolist()))
            terms = []
            for place in mask.nonzero().flatten().tolist():
                logits = slow_logits(head, there[3 + place])
                target = slow_softmax(logits, 0.06, method.patch_targets.centre.tolist())
                terms.append(slow_ce(slow_logits(method.head, here[3 + place]), target))
            patches += sum(terms) / max(len(terms), 1)
        for i in range(2):
            local = encoder(view(encoder, batch, sample, i, local=True)).tokens[0]
            seen.append(slow_logits(method.head, local[0]))
        students.append(seen)
        targets.append(told)
    return slow_view_loss(students, targets), patches / (2 * len(batch))


def test_losses_equal_reference(method: IBOT, views: Batch) -> None:
    losses = method.loss(method.embed(views, key(0, 0)).shared)
    of_views, of_patches = slow_losses(method, views)
    assert losses["views"].item() == pytest.approx(of_views, rel=1e-4)
    assert losses["patches"].item() == pytest.approx(of_patches, rel=1e-4)
    assert method.weights() == {}
    assert 0 < method.report()["floor"] < of_views + of_patches


def test_the_student_does_not_see_masked_patches_and_the_teacher_does(method: IBOT, views: Batch) -> None:
    before = method.embed(views, key(0, 0)).shared
    sample, number, place = views["mask"].nonzero()[0].tolist()
    views["colour"][:] = torch.tensor([1, 1, 1, 0, 0, 1, 2, 3, 0, 0, 0])  # no blur, which would spread the change
    plain = method.embed(views, key(0, 0)).shared
    top, left = place // 4 * 8, place % 4 * 8
    views["image"][sample, number, :, top : top + 8, left : left + 8] += 100
    changed = method.embed(views, key(0, 0)).shared
    assert not torch.equal(before["student"], plain["student"])
    for name in ("student", "student_patches"):
        assert torch.equal(changed[name], plain[name]), name
    for name in ("teacher", "teacher_patches"):
        assert not torch.equal(changed[name], plain[name]), name


def test_rows_are_the_masked_patches(method: IBOT, views: Batch) -> None:
    shared = method.embed(views, key(0, 0)).shared
    rows = int(views["mask"].sum())
    assert shared["student"].shape == (3, 4, 8) and shared["teacher"].shape == (3, 2, 8)
    assert shared["student_patches"].shape == shared["teacher_patches"].shape == (rows, 8)
    assert shared["masked"].shape == (rows,) and not shared["masked"].is_floating_point()
    assert (1 / shared["masked"]).sum().item() == pytest.approx(int(views["mask"].any(-1).sum()))


def test_nothing_masked(method: IBOT, views: Batch) -> None:
    views["mask"][:] = False
    losses = method.loss(method.embed(views, key(0, 0)).shared)
    assert losses["patches"].item() == 0 and math.isfinite(losses["views"].item())
    torch.stack(list(losses.values())).sum().backward()
    without = {n for n, p in method.named_parameters() if p.grad is None and not n.startswith("teacher.")}
    assert without == {"encoder.backbone.pos_embed"}
    method.after_step(Progress(0, 10))
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_each_loss_has_its_own_centre(method: IBOT, views: Batch) -> None:
    """That of patches follows all of them, masked or not."""
    centres = [method.targets.centre.clone(), method.patch_targets.centre.clone()]
    teacher, head = method.teacher["encoder"], method.teacher["head"]
    tokens, patches = [], []
    with torch.no_grad():
        for sample in range(3):
            for i in range(2):
                encoded = teacher(view(method.encoder, views, sample, i)).tokens[0]
                tokens.append(slow_logits(head, encoded[0]))
                patches += [slow_logits(head, encoded[3 + place]) for place in range(16)]
    method.loss(method.embed(views, key(0, 0)).shared)
    method.after_step(Progress(0, 10))
    for targets, before, rows in zip((method.targets, method.patch_targets), centres, (tokens, patches), strict=True):
        torch.testing.assert_close(targets.centre, 0.9 * before + 0.1 * torch.tensor(rows).mean(0))


def test_step_settings(method: IBOT, views: Batch) -> None:
    method.start_step(Progress(15, 800))
    assert method.targets.temperature == pytest.approx(0.055)
    assert method.patch_targets.temperature == pytest.approx(0.065)
    method.start_step(Progress(0, 800))
    torch.stack(list(method.loss(method.embed(views, key(0, 0)).shared).values())).sum().backward()
    assert method.head.direction.grad is not None and not method.head.direction.grad.any()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method.mask_token.grad is not None and method.mask_token.grad.any()


def test_teacher_follows_encoder_and_head(method: IBOT) -> None:
    before = {n: v.clone() for n, v in method.teacher.state_dict().items()}
    method.after_step(Progress(0, 10))
    students = {f"{name}.{n}": v for name, s in method.students().items() for n, v in s.state_dict().items()}
    for name, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.996 * before[name] + 0.004 * students[name])
    assert method.evaluated is method.teacher["encoder"]


def test_mask_token_decays_as_in_the_source(method: IBOT) -> None:
    names = {id(p): n for n, p in method.named_parameters()}
    decayed = {names[id(p)] for g in parameter_groups(method, IBOT.optim) if g["decays"] for p in g["params"]}
    assert "mask_token" in decayed and not any("bias" in n or "norm" in n for n in decayed)


def test_masks() -> None:
    """Half of the views are masked, in blocks, with ratios from .1 to .5; both views draw for themselves."""
    prepare = IBOTPrepare(None, (14, 14), 0.5, (0.1, 0.5))
    masks = [[prepare._mask(key(0, p).child(name)) for name in ("first", "second")] for p in range(500)]
    counts = torch.tensor([[int(mask.sum()) for mask in pair] for pair in masks])
    masked = counts > 0
    assert masked.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (masked[:, 0] & masked[:, 1]).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert counts.max() <= 98 and counts[masked].float().mean().item() == pytest.approx(0.3 * 196, abs=8)
    assert counts[masked].float().quantile(0.05) < 35 and counts[masked].float().quantile(0.95) > 85
    assert all(mask.shape == (196,) and mask.dtype == torch.bool for pair in masks for mask in pair)


def test_prepare_is_dinos_with_masks(method: IBOT, corpus: Corpus, document: Callable[..., Document]) -> None:
    prepare, at = method.prepare(Crop(), 32), key(0, 5)
    dino = DINO(DINO.Config(views=CONFIG.views, head=CONFIG.head), method.encoder, corpus)
    example, views = prepare(document(), at), dino.prepare(Crop(), 32)(document(), at)
    assert example is not None and views is not None
    assert example["mask"].shape == (2, 16) and example["mask"].dtype == torch.bool
    assert set(example) == {*views, "mask"} and all(torch.equal(example[n], value) for n, value in views.items())
    assert prepare(Document((), "empty"), at) is None
    always = dataclasses.replace(prepare, masked_views=1.0)(document(), at)
    assert always is not None and always["mask"].any(-1).all()


def test_defaults() -> None:
    config = IBOT.Config()
    assert (config.views.locals, config.head.prototypes, IBOT.optim) == (10, 8192, DINO.optim)
    assert config.views.first.crop.scale == (0.25, 1.0) and config.views.local.crop.scale == (0.05, 0.25)
    assert IBOT.masked and IBOT.shares
