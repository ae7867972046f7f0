"""DINO: the loss against a slow reference, what teacher, centre and last layer do, and its views."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.multicrop import dino_views
from altsight.data.views import Crop
from altsight.losses.self_distillation import TargetConfig
from altsight.methods.base import Corpus
from altsight.methods.dino import DINO, HeadConfig
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.optim import parameter_groups
from tests.methods.distillation import batch_of, slow_logits, slow_softmax, slow_view_loss, stir, view

CONFIG = DINO.Config(
    views=dino_views((0.4, 1.0), (0.05, 0.4), 3), head=HeadConfig(hidden=24, bottleneck=8, prototypes=12)
)


def build(encoder: Encoder, corpus: Corpus, config: DINO.Config = CONFIG) -> DINO:
    method = DINO(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> DINO:
    return build(encoder, corpus)


@pytest.fixture
def views(method: DINO, document: Callable[..., Document]) -> Batch:
    return batch_of(method, document)


def loss_of(method: DINO, batch: Batch) -> Tensor:
    return method.loss(method.embed(batch, key(0, 0)).shared)["views"]


def teacher_logits(method: DINO, batch: Batch, sample: int, number: int) -> list[float]:
    """View by view, by the CLS token."""
    teacher = method.teacher["encoder"]
    return slow_logits(method.teacher["head"], teacher(view(teacher, batch, sample, number)).tokens[0, 0])


@torch.no_grad()
def slow_loss(method: DINO, batch: Batch) -> float:
    students, targets = [], []
    for sample in range(len(batch)):
        images = [view(method.encoder, batch, sample, i) for i in range(2)]
        images += [view(method.encoder, batch, sample, i, local=True) for i in range(3)]
        students.append([slow_logits(method.head, method.encoder(image).tokens[0, 0]) for image in images])
        centre = method.targets.centre.tolist()
        logits = [teacher_logits(method, batch, sample, i) for i in range(2)]
        targets.append([slow_softmax(row, 0.04, centre) for row in logits])
    return slow_view_loss(students, targets)


def test_loss_equals_reference(method: DINO, views: Batch) -> None:
    stir(method, (method.targets.centre,))
    assert loss_of(method, views).item() == pytest.approx(slow_loss(method, views), rel=1e-4)


def test_a_view_is_not_compared_with_itself(method: DINO, views: Batch) -> None:
    """Teacher 1 and student 1 take part in the other pairs only, so a gradient reaches both globals from the other."""
    shared = {n: v.detach().requires_grad_() for n, v in method.embed(views, key(0, 0)).shared.items()}
    method.loss(shared)["views"].backward()
    grad = shared["student"].grad
    assert grad is not None and (grad.abs().sum(-1) > 0).all()
    assert shared["teacher"].grad is None
    alone = {n: v.detach()[:, :2].clone().requires_grad_() for n, v in shared.items()}
    alone["teacher"].requires_grad_(False)[:, 1] = 0  # says nothing but the centre: 0
    terms = method.loss(alone)["views"]
    terms.backward()
    first = slow_reference_pair(method, alone["student"].detach()[:, 1], alone["teacher"][:, 0])
    second = slow_reference_pair(method, alone["student"].detach()[:, 0], alone["teacher"][:, 1])
    assert terms.item() == pytest.approx((first + second) / 2, rel=1e-4)


def slow_reference_pair(method: DINO, student: Tensor, teacher: Tensor) -> float:
    weight = method.head.direction.detach()
    weight = weight / weight.norm(dim=1, keepdim=True)
    targets = (teacher @ weight.T / 0.04).softmax(-1)
    return -(targets * (student @ weight.T / 0.1).log_softmax(-1)).sum(-1).mean().item()


def test_at_the_start_the_loss_is_about_ln_k(
    encoder: Encoder, corpus: Corpus, document: Callable[..., Document]
) -> None:
    head = HeadConfig(hidden=64, bottleneck=256, prototypes=4096)
    method = build(encoder, corpus, dataclasses.replace(CONFIG, head=head))
    assert abs(loss_of(method, batch_of(method, document)).item() - math.log(4096)) < 1


def test_teacher_gets_no_gradient_and_the_student_does(method: DINO, views: Batch) -> None:
    loss_of(method, views).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    without = {n for n, p in method.named_parameters() if p.grad is None and not n.startswith("teacher.")}
    assert without == {"encoder.backbone.pos_embed"}
    assert method.evaluated is method.teacher["encoder"]


def test_teacher_starts_as_the_student_and_follows_it(encoder: Encoder, corpus: Corpus) -> None:
    method = build(encoder, corpus)
    pairs = [(student.state_dict(), method.teacher[name].state_dict()) for name, student in method.students().items()]
    assert all(torch.equal(s[n], t[n]) for s, t in pairs for n in s)
    for step, momentum in ((0, 0.996), (500, 0.998), (1000, 1.0)):
        before = method.teacher["head"].direction.clone()
        with torch.no_grad():
            method.head.direction += 1
        method.after_step(Progress(step, 1000))
        expected = momentum * before + (1 - momentum) * method.head.direction
        torch.testing.assert_close(method.teacher["head"].direction, expected)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_extreme_momenta(encoder: Encoder, corpus: Corpus, momentum: float) -> None:
    method = build(encoder, corpus, dataclasses.replace(CONFIG, teacher_momentum=momentum))
    before = {n: v.clone() for n, v in method.teacher.state_dict().items()}
    stir(method.encoder, ())
    method.after_step(Progress(0, 10))
    now = method.teacher.state_dict()
    want = {f"encoder.{n}": v for n, v in method.encoder.state_dict().items()} if momentum == 0 else before
    assert all(torch.equal(now[n], v) for n, v in want.items())


def test_centre_follows_the_mean_of_the_teachers_logits(method: DINO, views: Batch) -> None:
    stir(method, (method.targets.centre,))
    before = method.targets.centre.clone()
    with torch.no_grad():
        rows = [teacher_logits(method, views, sample, i) for sample in range(3) for i in range(2)]
    loss_of(method, views)
    assert torch.equal(method.targets.centre, before)
    method.after_step(Progress(0, 10))
    torch.testing.assert_close(method.targets.centre, 0.9 * before + 0.1 * torch.tensor(rows).mean(0))


def test_without_centring_there_is_no_centre(
    encoder: Encoder, corpus: Corpus, document: Callable[..., Document]
) -> None:
    method = build(encoder, corpus, dataclasses.replace(CONFIG, targets=TargetConfig("none")))
    views = batch_of(method, document)
    assert loss_of(method, views).item() == pytest.approx(slow_loss(method, views), rel=1e-4)
    method.after_step(Progress(0, 10))
    assert not method.targets.centre.any()


def test_last_layer_rests_at_first(method: DINO, views: Batch) -> None:
    for step, rests in ((0, True), (1, True), (2, False), (900, False)):
        method.start_step(Progress(step, 1600))
        method.zero_grad()
        loss_of(method, views).backward()
        for parameter in (method.head.direction, method.head.length):
            assert parameter.grad is not None and parameter.grad.any().item() is not rests
        assert method.head.mlp[0].weight.grad is not None and method.head.mlp[0].weight.grad.any()


def test_teachers_temperature_warms_up(method: DINO) -> None:
    for step, temperature in ((0, 0.04), (15, 0.055), (30, 0.07), (799, 0.07)):
        method.start_step(Progress(step, 800))
        assert method.report()["teacher_temperature"] == pytest.approx(temperature)


def test_biases_norms_and_tokens_of_one_dimension_do_not_decay(method: DINO) -> None:
    names = {id(p): n for n, p in method.named_parameters()}
    decayed = {names[id(p)] for g in parameter_groups(method, DINO.optim) if g["decays"] for p in g["params"]}
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert decayed == {n for n, p in trained.items() if p.ndim > 1}
    assert "head.direction" in decayed and not any("bias" in n or "norm" in n for n in decayed)


def test_drop_path_is_the_students_alone(corpus: Corpus, document: Callable[..., Document]) -> None:
    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2, drop_path=0.5)
    method = build(Encoder(config), corpus).train()
    views = batch_of(method, document, samples=8)
    (one, other) = (method.embed(views, key(0, 0)).shared for _ in range(2))
    assert torch.equal(one["teacher"], other["teacher"])
    assert not torch.equal(one["student"], other["student"])


def test_floor_is_the_entropy_of_the_targets(method: DINO, views: Batch) -> None:
    """What remains of the loss once the student says what the teacher says."""
    stir(method, (method.targets.centre,))
    loss = loss_of(method, views).item()
    targets = [
        slow_softmax(teacher_logits(method, views, s, i), 0.04, (method.targets.centre).tolist())
        for s in range(3)
        for i in range(2)
    ]
    entropy = sum(-t * math.log(t) for row in targets for t in row if t > 0) / len(targets)
    report = method.report()
    assert report["floor"] == pytest.approx(entropy, rel=1e-3) == report["target_entropy"]
    assert loss > report["floor"]


def test_prepare(method: DINO, document: Callable[..., Document]) -> None:
    prepare = method.prepare(Crop(), 32)
    example, again = prepare(document(), key(0, 5)), prepare(document(), key(0, 5))
    assert example is not None and again is not None
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in example.items()}
    assert shapes == {
        "image": ((2, 3, 32, 32), torch.uint8),
        "colour": ((2, 11), torch.float32),
        "local": ((3, 3, 16, 16), torch.uint8),
        "local_colour": ((3, 11), torch.float32),
    }
    assert all(torch.equal(example[name], again[name]) for name in example)
    assert not torch.equal(example["image"][0], example["image"][1])
    assert not torch.equal(example["local"][0], example["local"][1])
    assert prepare(Document((), "empty"), key(0, 5)) is None


def test_views_are_dinos() -> None:
    views = DINO.Config().views
    assert views.locals == 8
    assert [v.crop.scale for v in (views.first, views.second, views.local)] == [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]
    assert [v.colour.blur for v in (views.first, views.second, views.local)] == [1.0, 0.1, 0.5]
    assert [v.colour.solarize for v in (views.first, views.second, views.local)] == [0.0, 0.2, 0.0]
    jitter = views.first.colour
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (jitter.jitter, jitter.grey) == (0.8, 0.2)


@pytest.mark.parametrize(
    ("size", "patch", "side"), [(224, 16, 96), (224, 14, 98), (224, 8, 96), (32, 8, 16), (32, 16, 16)]
)
def test_size_of_local_views(size: int, patch: int, side: int) -> None:
    assert DINO.Config().views.side(size, patch) == side


def test_local_views_must_fit_the_patches(method: DINO, encoder: Encoder, corpus: Corpus) -> None:
    for size, fits in ((24, True), (20, False), (4, False), (0, False)):
        config = dataclasses.replace(CONFIG, views=dataclasses.replace(CONFIG.views, local_size=size))
        if fits:
            assert build(encoder, corpus, config).prepare(Crop(), 32).local_size == size
            continue
        with pytest.raises(UserError, match=f"local views of {size} pixels cannot be cut into patches of 8"):
            build(encoder, corpus, config).prepare(Crop(), 32)


def test_without_local_views(encoder: Encoder, corpus: Corpus, document: Callable[..., Document]) -> None:
    config = dataclasses.replace(CONFIG, views=dataclasses.replace(CONFIG.views, locals=0))
    method = build(encoder, corpus, config)
    views = batch_of(method, document)
    assert set(views.tensors) == {"image", "colour"}
    assert method.embed(views, key(0, 0)).shared["student"].shape == (3, 2, 8)
    assert math.isfinite(loss_of(method, views).item())


def test_an_encoder_without_cls_token_is_read_at_the_mean(corpus: Corpus, document: Callable[..., Document]) -> None:
    method = build(Encoder(EncoderConfig("resnet18", img_size=64)), corpus).train()
    views = batch_of(method, document, size=64)
    assert views["local"].shape[-1] == 32
    before = method.teacher["encoder"].backbone.bn1.running_mean.clone()
    shared = method.embed(views, key(0, 0)).shared
    assert shared["student"].shape == (3, 5, 8) and shared["teacher"].shape == (3, 2, 8)
    after = method.teacher["encoder"].backbone.bn1.running_mean
    assert not torch.equal(after, before), "the teacher's batch norm sees statistics of its own"


def test_published_sizes() -> None:
    """DINO's head on ViT-S, its layers written out; lengths of prototypes are trained where they are not kept at 1."""
    with torch.device("meta"):
        head = HeadConfig(norm_last_layer=True).build(384)
    maps = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == maps + 65536 * 256
    with torch.device("meta"):
        free = HeadConfig().build(384)
    assert free.length.requires_grad and not head.length.requires_grad
    assert DINO.optim.peak_lr(1024) == pytest.approx(2e-3)
