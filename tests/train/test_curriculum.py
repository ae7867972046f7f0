"""Accelerators: the published tables, where stages begin, what they cost, and that runs stay what they were."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key, torch_seeded
from altsight.data.loader import Loader
from altsight.data.prepared import Prepared
from altsight.methods import METHODS
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.account import flops_per_sample
from altsight.train.checkpoint import load_latest
from altsight.train.curriculum import AccelerateConfig, Curriculum, full_size, make_curriculum, set_input_size
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.run import Run, build
from tests.contract.test_resume import assert_identical
from tests.contract.tiny import tiny_run

CURRICULA = ("efficienttrain", "efficienttrain++", "efficienttrain++_deit", "progressive")


class Images(Method):
    """As much of a method as a curriculum asks for."""

    drops_patches = True


def plan(name: str, steps: int, batch: int = 8, size: int = 224, model: str = "vit", **settings: Any) -> Curriculum:
    """Return the curriculum `name` on a shallow ViT of patches of 16 pixels, or on another model."""
    config = EncoderConfig("vit_tiny_patch16_224", size, 16, width=24, depth=1, heads=1)
    encoder = Encoder(config if model == "vit" else EncoderConfig(model, size))
    return make_curriculum(AccelerateConfig(name, **settings), Images(encoder), "images", steps, batch)  # type: ignore[arg-type]


def accelerated(run: Run[Any], **settings: Any) -> Run[Any]:
    return dataclasses.replace(run, accelerate=AccelerateConfig(**settings))


def table(curriculum: Curriculum) -> list[tuple[int, int, int, int | None]]:
    return [(s.start, s.stop, s.size, s.magnitude) for s in curriculum.stages]


def test_without_an_accelerator_a_run_is_one_stage_and_the_method_s_own_preparation(sample_data: Prepared) -> None:
    run = tiny_run("clip", sample_data.directory, 160, batch=16)
    method = build(run, Corpus.of(sample_data))
    curriculum = make_curriculum(run.accelerate, method, "clip", 10, 16)
    assert table(curriculum) == [(0, 10, 32, None)] and curriculum.progress(7) == 7
    assert curriculum.prepare(method, run.data.crop) == method.prepare(run.data.crop, 32)


def test_efficienttrain_in_epochs() -> None:
    curriculum = plan("efficienttrain", 300)
    expected = [(0, 60, 160, 1), (60, 120, 160, 3), (120, 180, 160, 5), (180, 240, 192, 7), (240, 300, 224, 9)]
    assert table(curriculum) == expected and curriculum.shrink == "low_frequency"
    assert curriculum.relative_compute == pytest.approx(0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2)
    assert curriculum.relative_compute == pytest.approx(0.653, abs=5e-4)
    assert 1 / curriculum.relative_compute == pytest.approx(1.53, abs=5e-3)


@pytest.mark.parametrize(("name", "seventh"), [("efficienttrain++", 224), ("efficienttrain++_deit", 192)])
def test_efficienttrain_plus_plus_in_compute(name: str, seventh: int) -> None:
    sides = [96] * 2 + [160] * 4 + [seventh] * 2 + [224] * 2
    # The source's real epochs for E = 200 equivalent ones; steps are hundredths of an epoch.
    epochs = [20 * (224 / side) ** 2 for side in sides]
    curriculum = plan(name, round(100 * sum(epochs)))
    assert [s.size for s in curriculum.stages] == sides
    assert [s.magnitude for s in curriculum.stages] == list(range(10))
    assert [s.stop - s.start for s in curriculum.stages] == pytest.approx([100 * e for e in epochs], abs=1)
    assert curriculum.shrink == "resize"
    # The ledger: E in total, a tenth in every stage, whatever the sizes.
    assert curriculum.compute(curriculum.stages[-1].stop) / 100 == pytest.approx(200, rel=1e-4)
    for stage in curriculum.stages:
        assert curriculum.compute(stage.stop) - curriculum.compute(stage.start) == pytest.approx(2000, abs=1)
    if seventh == 224:
        assert sum(epochs) == pytest.approx(455, abs=0.5)


def test_progressive_grows_linearly_from_half() -> None:
    assert [(s.size, s.magnitude) for s in plan("progressive", 40, size=192).stages] == [
        *((96, None), (128, None), (160, None), (192, None))
    ]


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize(("size", "patch"), [(224, 14), (224, 32), (32, 8), (98, 7), (30, 5), (256, 16)])
def test_sizes_scale_with_the_input_and_are_cut_into_whole_patches(name: str, size: int, patch: int) -> None:
    config = EncoderConfig("vit_tiny_patch16_224", size, patch, width=24, depth=1, heads=1)
    curriculum = make_curriculum(AccelerateConfig(name), Images(Encoder(config)), "x", 100, 8)  # type: ignore[arg-type]
    sizes = [s.size for s in curriculum.stages]
    assert sizes == sorted(sizes) and sizes[-1] == size
    original = {"progressive": 112, "efficienttrain": 160}.get(name, 96)
    for side in sizes[:-1]:
        assert side % patch == 0 and (side % 2 == 0 or side == size)
    assert abs(sizes[0] - original * size / 224) <= math.lcm(2, patch) / 2 + 1e-9 or sizes[0] == math.lcm(2, patch)


def test_stages_fall_on_whole_batches_and_short_runs_have_fewer() -> None:
    for steps in (1, 2, 3, 7, 23):
        for name in CURRICULA:
            curriculum = plan(name, steps, size=32)
            assert [s.start for s in curriculum.stages] == [0, *(s.stop for s in curriculum.stages[:-1])]
            assert curriculum.stages[-1].stop == steps
            assert [curriculum.stage(step).start <= step < curriculum.stage(step).stop for step in range(steps)]
            assert curriculum.stage(steps) == curriculum.stages[-1]


def test_efficienttrain_follows_samples_and_its_successor_compute() -> None:
    first = plan("efficienttrain", 100)
    assert [first.progress(step) for step in range(101)] == list(range(101))
    second = plan("efficienttrain++", 100)
    cost = [(second.stage(step).size / 224) ** 2 for step in range(100)]
    expected = [100 * sum(cost[:step]) / sum(cost) for step in range(101)]
    assert [second.progress(step) for step in range(101)] == pytest.approx(expected)
    assert second.progress(50) < 45


@pytest.mark.parametrize("name", CURRICULA)
def test_settings_of_the_source_can_be_changed(name: str) -> None:
    changed = plan(name, 100, shrink="resize", augment=False)
    assert changed.shrink == "resize" and all(s.magnitude is None for s in changed.stages)
    assert plan(name, 100, shrink="low_frequency").shrink == "low_frequency"


def test_encoders_that_cannot_follow_are_refused_and_convolutions_can() -> None:
    with pytest.raises(UserError, match="cannot take the images of 160 x 160"):
        plan("efficienttrain", 10, model="swin_tiny_patch4_window7_224")
    relative = EncoderConfig("vit_tiny_patch16_224", 32, 8, 24, 1, 1, relative_positions=True)
    with pytest.raises(UserError, match="relative positions hold for"):
        make_curriculum(AccelerateConfig("progressive"), Images(Encoder(relative)), "x", 10, 8)
    assert [s.size for s in plan("progressive", 4, size=96, model="test_resnet").stages] == [48, 64, 80, 96]


def batches(run: Run[Any], prepared: Prepared, method: Method, place: World = World()) -> list[Any]:  # noqa: B008
    curriculum = make_curriculum(run.accelerate, method, run.name, run.steps, run.train.batch)
    prepare, order = curriculum.prepare(method, run.data.crop), prepared.source.order(0)
    loader = Loader(prepared.source, order, prepare, run.train.batch)
    return [batch for batch, _ in loader.batches(place, 0, run.steps * run.train.batch)]


REFUSE = {"simmim": "squares"}
"""Methods that cannot follow the sizes of this test, and a word of what they say."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_follows_a_curriculum(name: str, sample_data: Prepared) -> None:
    run = tiny_run(name, sample_data.directory, 4 * 4, batch=4)
    for shrink in ("low_frequency", "resize"):
        method = build(run, Corpus.of(sample_data))
        curriculum = make_curriculum(AccelerateConfig("progressive", shrink), method, name, 4, 4)  # type: ignore[arg-type]
        assert [s.size for s in curriculum.stages] == [16, 24, 24, 32]
        if name in REFUSE:
            with pytest.raises(UserError, match=REFUSE[name]):
                curriculum.prepare(method, run.data.crop)
            return
        chosen = accelerated(run, curriculum="progressive", shrink=shrink)
        costs = []
        for stage, batch in zip(curriculum.stages, batches(chosen, sample_data, method), strict=True):
            set_input_size(method, stage.size)
            assert method.evaluated.input_size == method.encoder.input_size == stage.size
            with torch_seeded(key(0, 0, "step")), torch.no_grad():
                out = method.embed(batch, key(0, 0))
            assert out.local.keys() == method.counts(batch).keys()
            losses = {**out.local, **(method.loss(out.shared) if out.shared else {})}
            assert all(math.isfinite(loss.item()) for loss in losses.values())
            if stage in (curriculum.stages[0], curriculum.stages[-1]):
                costs.append(flops_per_sample(method, batch))
        assert costs[0] < 0.9 * costs[1], costs


@pytest.mark.parametrize(("name", "shrink"), [("efficienttrain", "source"), ("efficienttrain++", "low_frequency")])
def test_the_samples_are_those_of_a_run_without(name: str, shrink: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 16 * 10, batch=16)
    plain = pretrain(run, sample_data, tmp_path / "plain")
    done = pretrain(accelerated(run, curriculum=name, shrink=shrink), sample_data, tmp_path / name)
    assert done.sample_hash == plain.sample_hash and done.samples_seen == plain.samples_seen
    assert done.initial_encoder == plain.initial_encoder and done.flops < 0.9 * plain.flops


def test_what_a_sample_becomes_depends_on_its_position_alone(sample_data: Prepared) -> None:
    run = accelerated(tiny_run("clip", sample_data.directory, 8 * 10, batch=8), curriculum="efficienttrain++")
    method = build(run, Corpus.of(sample_data))
    whole = batches(run, sample_data, method)
    parts = [batches(run, sample_data, method, World(rank, 4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        dealt = torch.stack([part[step]["image"] for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(dealt, batch["image"])
    assert {batch["image"].shape[-1] for batch in whole} == {16, 24, 32}


def test_flops_are_counted_anew_in_every_stage(sample_data: Prepared, tmp_path: Path) -> None:
    run = accelerated(tiny_run("clip", sample_data.directory, 16 * 8, batch=16), curriculum="progressive")
    seen: list[int] = []
    probed = dataclasses.replace(run, train=dataclasses.replace(run.train, probe_every=16))

    def probe(method: Method) -> dict[str, float]:
        seen.append(method.encoder.input_size)
        return {}

    done = pretrain(probed, sample_data, tmp_path, probe)
    totals = [0, *(line["flops"] for line in read_log(tmp_path))]
    steps = [after - before for before, after in itertools.pairwise(totals)]
    assert steps[0] == steps[1] < steps[2] == steps[3] == steps[4] == steps[5] < steps[6] == steps[7]
    assert done.flops == pytest.approx(sum(steps))
    # Evaluations see full images, whatever the stage.
    assert seen == [32] * 8


def test_full_size_is_put_back() -> None:
    method = Images(Encoder(EncoderConfig("vit_tiny_patch16_224", 32, 8, 24, 1, 1)))
    set_input_size(method, 16)
    with pytest.raises(ZeroDivisionError), full_size(method):
        assert method.encoder.input_size == 32
        raise ZeroDivisionError
    assert method.encoder.input_size == 16


@pytest.mark.parametrize("name", ["efficienttrain", "efficienttrain++"])
def test_resuming_across_a_stage_is_bit_identical(name: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 16 * 10, batch=16, checkpoint_every=16, keep=20)
    run = accelerated(run, curriculum=name)
    pretrain(run, sample_data, tmp_path)
    folder = tmp_path / "checkpoints"
    whole = load_latest(folder, print)
    stages = plan(name, 10, size=32).stages
    (tmp_path / "summary.json").unlink()
    for newest in folder.iterdir():
        # Go on from inside of the first stage.
        if int(newest.stem.removeprefix("samples_").split(".")[0]) > 16 * (stages[0].stop - 1):
            newest.unlink()
    pretrain(run, sample_data, tmp_path)
    assert_identical(load_latest(folder, print), whole)


def test_the_learning_rate_is_continuous_in_compute(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 16 * 20, batch=16)
    optim = dataclasses.replace(run.optim, lr=1.0, lr_base_batch=0, warmup_fraction=0.1, final_weight_decay=0.5)
    run = accelerated(dataclasses.replace(run, optim=optim), curriculum="efficienttrain++")
    pretrain(run, sample_data, tmp_path)
    sides = [stage.size for s in range(20) for stage in [make_tiny(20).stage(s)]]
    spent, total = 0.0, sum((side / 32) ** 2 for side in sides)
    for line, side in zip(read_log(tmp_path), sides, strict=True):
        share = spent / total
        expected = share / 0.1 if share < 0.1 else (1 + math.cos(math.pi * share)) / 2
        assert line["lr"] == pytest.approx(expected, abs=1e-9)
        spent += (side / 32) ** 2


def make_tiny(steps: int) -> Curriculum:
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", 32, 8, 24, 1, 1))
    return make_curriculum(AccelerateConfig("efficienttrain++"), Images(encoder), "x", steps, 16)


def test_patch_dropout_reaches_the_encoder_and_saves(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 16 * 4, batch=16)
    plain = pretrain(run, sample_data, tmp_path / "plain")
    half = pretrain(accelerated(run, patch_dropout=0.5), sample_data, tmp_path / "half")
    assert half.sample_hash == plain.sample_hash and half.flops < 0.9 * plain.flops
    both = accelerated(run, patch_dropout=0.5, curriculum="progressive")
    method = build(both, Corpus.of(sample_data))
    kept = [batch["visible"].shape[1] for batch in batches(both, sample_data, method)]
    assert kept == [2, 4, 4, 8]


@pytest.mark.parametrize("name", METHODS)
def test_patch_dropout_is_heeded_or_refused(name: str, sample_data: Prepared) -> None:
    """No method may leave `visible` aside without a word, nor claim to heed it."""
    run = accelerated(tiny_run(name, sample_data.directory, 16, batch=4), patch_dropout=0.5)
    method = build(run, Corpus.of(sample_data))
    if method.masked or not method.drops_patches:
        with pytest.raises(UserError, match="hides patches itself" if method.masked else "cannot drop patches"):
            make_curriculum(run.accelerate, method, name, 4, 4)
        return
    batch = batches(run, sample_data, method)[0]
    assert batch["visible"].shape == (4, 8)
    dropped = flops_per_sample(method, batch)
    del batch.tensors["visible"]
    assert dropped < 0.9 * flops_per_sample(method, batch)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99])
def test_a_dropout_that_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="must leave some"):
        plan("none", 10, size=32, patch_dropout=ratio)


def test_convolutions_have_no_patches_to_drop() -> None:
    with pytest.raises(UserError, match="no patches that can be left out"):
        plan("none", 10, size=64, model="test_resnet", patch_dropout=0.25)
