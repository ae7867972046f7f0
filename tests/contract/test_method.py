"""What every entry of METHODS must fulfil besides the tests on ranks and resume."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from altsight.core.dist import World
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.loader import Loader
from altsight.data.prepared import Prepared
from altsight.evals.load import load_view, view_of
from altsight.methods import METHODS
from altsight.methods.base import Corpus, Method
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.checkpoint import load_latest
from altsight.train.loop import pretrain
from altsight.train.optim import make_optimizer
from altsight.train.parallel import parallelize
from altsight.train.run import build, default_run, load_run, save_run, weights_hash
from tests.contract.tiny import tiny_run, with_seed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(sample_data: Prepared) -> Corpus:
    return Corpus(sample_data.tokenizer, sample_data.classes)


def first_batch(method: Method, data: Prepared, run: Any, workers: int = 0) -> Batch:
    """Return the first global batch of a run."""
    order = data.source.order(run.train.seed)
    loader = Loader(data.source, order, method.prepare(run.data.crop, run.encoder.img_size), run.train.batch, workers)
    return next(loader.batches(World(), 0, run.train.batch))[0]


def test_every_method_has_a_reference_test() -> None:
    """Losses are compared with a slow reference written from the formula, in tests/methods/test_<name>.py."""
    for name in METHODS:
        assert "slow" in (ROOT / f"tests/methods/test_{name}.py").read_text(), name


@pytest.mark.parametrize("name", METHODS)
def test_nan_never_survives_initialisation(name: str, corpus: Corpus, sample_path: Path) -> None:
    run = tiny_run(name, sample_path, 64)
    method = build(run, corpus)
    before = {n: v.clone() for n, v in method.state_dict().items()}
    with torch.no_grad():
        for tensor in method.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    method.init_weights(key(run.train.seed, 0, "init"))
    for n, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[n]), f"{n} is not a pure function of the key"


def test_all_methods_start_from_the_same_encoder(corpus: Corpus, sample_path: Path) -> None:
    hashes = {weights_hash(build(tiny_run(name, sample_path, 64), corpus).encoder) for name in METHODS}
    assert len(hashes) == 1
    other = with_seed(tiny_run("mae", sample_path, 64), 1)
    assert weights_hash(build(other, corpus).encoder) not in hashes


@pytest.mark.parametrize("name", METHODS)
def test_prepare_is_picklable_and_hands_over_uint8(name: str, corpus: Corpus, sample_data: Prepared) -> None:
    run = tiny_run(name, sample_data.directory, 64, batch=8)
    method = build(run, corpus)
    pickle.loads(pickle.dumps(method.prepare(run.data.crop, run.encoder.img_size)))
    here, there = first_batch(method, sample_data, run), first_batch(method, sample_data, run, workers=1)
    assert here["image"].dtype == torch.uint8
    for field, tensor in here.tensors.items():
        assert torch.equal(tensor, there[field]), field


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_gets_a_gradient_and_decay_is_declared(
    name: str, corpus: Corpus, sample_data: Prepared
) -> None:
    run = tiny_run(name, sample_data.directory, 64)
    method = build(run, corpus)
    batch = first_batch(method, sample_data, run)
    losses, counts = Accumulator(method, Embed(method), seed=0)(batch)
    without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(math.isfinite(float(v)) for v in losses.values())
    assert set(method.counts(batch)) == set(counts) <= set(losses)
    assert set(method.weights()) <= set(losses)
    names = dict(method.named_parameters())
    assert method.no_weight_decay() <= set(names), method.no_weight_decay() - set(names)
    optimizer = make_optimizer(method, run.optim, run.train.batch)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert not any(p.ndim < 2 and id(p) in decayed for p in names.values())
    assert not any(id(names[n]) in decayed for n in method.no_weight_decay())


@pytest.mark.parametrize("name", METHODS)
def test_configuration_survives_json(name: str, tmp_path: Path) -> None:
    run = default_run(name)
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json") == run


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_run_loads_to_the_same_features(name: str, sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run(name, sample_data.directory, 64)
    pretrain(run, sample_data, tmp_path)
    state = load_latest(tmp_path / "checkpoints", pytest.fail)
    assert state is not None
    method = build(run, Corpus(sample_data.tokenizer, sample_data.classes))
    fresh = view_of(method, name)
    images = [sample_data.source.image(i) for i in range(8)]
    pixels = torch.stack([fresh.preprocess(image) for image in images])
    untrained = fresh.features(pixels)
    method.load_state_dict(state["method"])
    loaded = load_view(tmp_path)
    assert torch.equal(loaded.features(pixels), fresh.features(pixels))
    learns = any(p.requires_grad for p in method.encoder.parameters())
    assert torch.equal(loaded.features(pixels), untrained) is not learns  # LiT's encoder is locked
    if fresh.is_dual:
        words = ["a red flower", "computer"]
        assert torch.equal(loaded.encode_text(words), fresh.encode_text(words))
        assert torch.equal(loaded.encode_image(pixels), fresh.encode_image(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_eager(name: str, corpus: Corpus, sample_data: Prepared) -> None:
    run = tiny_run(name, sample_data.directory, 64)
    gradients = []
    for compiled in (False, True):
        method = build(run, corpus)
        batch = first_batch(method, sample_data, run)
        Accumulator(method, parallelize(method, compiled), seed=0)(batch)
        gradients.append({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
    eager, fast = gradients
    assert eager.keys() == fast.keys()
    # A gradient that is zero in theory (of a shift that batch norm undoes) is found as rounding of the largest one.
    rounding = 2e-6 * max(float(expected.abs().max()) for expected in eager.values())
    for n, expected in eager.items():
        assert (fast[n] - expected).abs().max() < 1e-3 * expected.abs().max() + rounding, n
