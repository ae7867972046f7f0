"""DINOv2: its three losses against slow references, both ways of centring, heads, masks and rates."""

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
from altsight.methods.base import Corpus
from altsight.methods.dino import HeadConfig
from altsight.methods.dinov2 import DINOv2, DINOv2Prepare
from altsight.nn.encoder import Encoder
from altsight.train.optim import parameter_groups
from tests.methods.distillation import batch_of, slow_ce, slow_logits, slow_softmax, slow_view_loss, stir, view

TINY = HeadConfig(hidden=24, bottleneck=8, prototypes=12)
SHARED = DINOv2.Config(views=dino_views((0.32, 1.0), (0.05, 0.32), 2), head=TINY)
LARGE = dataclasses.replace(
    SHARED,
    shared_head=False,
    patch_head=dataclasses.replace(TINY, bottleneck=6, prototypes=10),
    targets=dataclasses.replace(SHARED.targets, centring="sinkhorn"),
)


def build(encoder: Encoder, corpus: Corpus, config: DINOv2.Config) -> DINOv2:
    method = DINOv2(config, encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    stir(method, (method.targets.centre, method.patch_targets.centre))
    return method


@pytest.fixture(params=[SHARED, LARGE], ids=["shared", "large"])
def method(encoder: Encoder, corpus: Corpus, request: pytest.FixtureRequest) -> DINOv2:
    return build(encoder, corpus, request.param)


@pytest.fixture
def views(method: DINOv2, document: Callable[..., Document]) -> Batch:
    return batch_of(method, document)


def slow_targets(method: DINOv2, rows: list[list[float]], centre: torch.Tensor) -> list[list[float]]:
    """Softmax of centred logits, or three rounds of Sinkhorn-Knopp over all rows."""
    if method.config.targets.centring == "softmax":
        return [slow_softmax(row, 0.04, centre.tolist()) for row in rows]
    q = [[math.exp(x / 0.04) for x in row] for row in rows]
    for _ in range(3):
        used = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[x / u for x, u in zip(row, used, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return q


@torch.no_grad()
def slow_losses(method: DINOv2, batch: Batch) -> dict[str, float]:
    encoder, teacher, count = method.encoder, method.teacher["encoder"], len(batch)
    patch_head = "views" if method.config.shared_head else "patches"
    head, patches = method.heads["views"], method.heads[patch_head]
    students: list[list[list[float]]] = []
    cls: list[list[list[float]]] = []
    told, taught, said, shares = [], [], [], []
    for sample in range(count):
        seen, features = [], []
        for i in range(2):
            image, mask = view(encoder, batch, sample, i), batch["mask"][sample, i]
            here = encoder(image, mask=mask[None], mask_token=method.mask_token[0]).tokens[0]
            there = teacher(image).tokens[0]
            features.append(here[0].double().tolist())
            seen.append(slow_logits(head, here[0]))
            told.append(slow_logits(method.teacher["views"], there[0]))
            for place in mask.nonzero().flatten().tolist():
                taught.append(slow_logits(method.teacher[patch_head], there[3 + place]))
                said.append(slow_logits(patches, here[3 + place]))
                shares.append(1 / int(mask.sum()))
        for i in range(2):
            token = encoder(view(encoder, batch, sample, i, local=True)).tokens[0, 0]
            seen.append(slow_logits(head, token))
        students.append(seen)
        cls.append(features)
    targets = slow_targets(method, told, method.targets.centre)
    patch_targets = slow_targets(method, taught, method.patch_targets.centre)
    terms = zip(said, patch_targets, shares, strict=True)
    return {
        "views": slow_view_loss(students, [targets[2 * i : 2 * i + 2] for i in range(count)]),
        "patches": sum(share * slow_ce(s, t) for s, t, share in terms) / (2 * count),
        "koleo": sum(slow_koleo([cls[sample][i] for sample in range(count)]) for i in range(2)),
    }


def slow_koleo(rows: list[list[float]]) -> float:
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -sum(math.log(distance + 1e-8) for distance in nearest) / len(rows)


def test_losses_equal_references(method: DINOv2, views: Batch) -> None:
    losses = {n: v.item() for n, v in method.loss(method.embed(views, key(0, 0)).shared).items()}
    assert losses == pytest.approx(slow_losses(method, views), rel=2e-4)
    assert method.weights() == {"koleo": 0.1}
    assert 0 < method.report()["floor"] < losses["views"] + losses["patches"]


def test_koleo_reads_the_cls_token_before_the_head(method: DINOv2, views: Batch) -> None:
    shared = method.embed(views, key(0, 0)).shared
    assert shared["cls"].shape == (3, 2, 32) and shared["cls"].requires_grad
    method.loss(shared)["koleo"].backward()
    assert all(p.grad is None for p in method.heads.parameters())
    assert method.encoder.backbone.cls_token.grad is not None and method.encoder.backbone.cls_token.grad.any()


def test_teacher_gets_no_gradient_and_everything_else_does(method: DINOv2, views: Batch) -> None:
    torch.stack(list(method.loss(method.embed(views, key(0, 0)).shared).values())).sum().backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    without = {n for n, p in method.named_parameters() if p.grad is None and not n.startswith("teacher.")}
    assert without == {"encoder.backbone.pos_embed"}


def test_teacher_follows_encoder_and_heads(method: DINOv2) -> None:
    before = {n: v.clone() for n, v in method.teacher.state_dict().items()}
    students = {f"{name}.{n}": v for name, s in method.students().items() for n, v in s.state_dict().items()}
    assert students.keys() == before.keys()
    assert any(n.startswith("patches.") for n in before) is not method.config.shared_head
    method.after_step(Progress(0, 10))
    for name, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.992 * before[name] + 0.008 * students[name])
    assert method.evaluated is method.teacher["encoder"]


def test_centres_follow_their_rows_under_softmax_only(method: DINOv2, views: Batch) -> None:
    before = [t.centre.clone() for t in (method.targets, method.patch_targets)]
    shared = method.embed(views, key(0, 0)).shared
    heads = [method.teacher["views"], method.teacher["views" if method.config.shared_head else "patches"]]
    rows = [h.logits(shared[n]) for h, n in zip(heads, ("teacher", "teacher_patches"), strict=True)]
    method.loss(shared)
    method.after_step(Progress(0, 10))
    moves = method.config.targets.centring == "softmax"
    for targets, centre, seen in zip((method.targets, method.patch_targets), before, rows, strict=True):
        expected = 0.9 * centre + 0.1 * seen.flatten(0, -2).mean(0) if moves else centre
        torch.testing.assert_close(targets.centre, expected)


def test_last_layers_rest_at_first(method: DINOv2, views: Batch) -> None:
    for step, rests in ((0, True), (9, True), (10, False)):
        method.start_step(Progress(step, 1000))
        method.zero_grad()
        torch.stack(list(method.loss(method.embed(views, key(0, 0)).shared).values())).sum().backward()
        for head in method.heads.values():
            assert head.direction.grad.any().item() is not rests
    assert method.targets.temperature == pytest.approx(0.04 + 0.03 * 0.01 / 0.3)


def test_rates_and_decay(method: DINOv2) -> None:
    names = {id(p): n for n, p in method.named_parameters()}
    groups = {names[id(p)]: g for g in parameter_groups(method, DINOv2.optim) for p in g["params"]}
    scale = {n: g["lr_scale"] for n, g in groups.items()}
    # Two blocks: the norm has layer 3, the last block 2, the embedding 0.
    assert scale["encoder.backbone.norm.weight"] == 1
    assert scale["encoder.backbone.blocks.1.mlp.fc1.weight"] == pytest.approx(0.9)
    assert scale["encoder.backbone.cls_token"] == pytest.approx(0.9**3)
    assert scale["encoder.backbone.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.9**3)
    assert scale["heads.views.direction"] == 1
    assert not any(g["decays"] for n, g in groups.items() if n.endswith("bias") or "norm" in n)
    assert DINOv2.optim.peak_lr(2048) == pytest.approx(4e-3 * math.sqrt(2))


def masks(grid: tuple[int, int], positions: range) -> torch.Tensor:
    """Masks of samples at `positions`, (n, 2, L); the picture's part of the preparation is left out."""
    prepare = DINOv2Prepare(lambda document, at: {}, grid, (0.1, 0.5))
    return torch.stack([prepare(Document((), "any"), key(0, p))["mask"] for p in positions])


def test_exactly_half_of_the_views_are_masked_with_ratios_spread_over_the_range() -> None:
    ratios = masks((16, 16), range(640, 704)).float().mean(-1)
    assert (ratios > 0).sum() == 64 and ((ratios > 0).sum(1) == 1).all()
    assert (ratios > 0).sum(0).tolist() == [32, 32]
    # A block that does not fit any more is left out, so a few masks are smaller than they were to be.
    for half in (ratios.amax(1), ratios[:, 0][ratios[:, 0] > 0], ratios[:, 1][ratios[:, 1] > 0]):
        share = half.histc(8, 0.1, 0.5) / len(half)
        assert half.max() <= 0.5 and share.min() >= 0.05 and share.max() <= 0.25, share


def test_a_sample_has_its_mask_whatever_the_batch() -> None:
    assert torch.equal(masks((16, 16), range(7, 12)), masks((16, 16), range(12))[7:])


def test_small_grids_are_masked_too() -> None:
    found = masks((4, 4), range(64)).sum(-1)
    assert found.max() <= 8 and (found.amax(1) > 0).float().mean() > 0.9


def test_prepare(method: DINOv2, document: Callable[..., Document]) -> None:
    prepare = method.prepare(Crop(), 32)
    example = prepare(document(), key(0, 5))
    assert example is not None
    assert example["image"].shape == (2, 3, 32, 32) and example["local"].shape == (2, 3, 16, 16)
    assert example["mask"].shape == (2, 16) and not example["mask"][0].any() and example["mask"][1].any()
    assert prepare(Document((), "empty"), key(0, 5)) is None


def test_defaults_are_the_short_recipe() -> None:
    config = DINOv2.Config()
    assert (config.views.locals, config.views.first.crop.scale) == (8, (0.32, 1.0))
    assert config.views.local.crop.scale == (0.05, 0.32)
    assert config.shared_head and config.targets.centring == "softmax"
    assert (config.head.hidden, config.head.bottleneck, config.head.prototypes) == (2048, 256, 65536)
    assert DINOv2.least_batch == 2
