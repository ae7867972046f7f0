"""The probes that are trained: MAE's linear one on frozen features, LCL's attentive one on frozen tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from altsight.core.config import OptimConfig, read_json
from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.evals.base import View
from altsight.nn.encoder import EncoderConfig
from altsight.train.optim import make_optimizer
from altsight.transfer import linear_probe as module
from altsight.transfer.attentive_probe import ADAMW, AttentiveClassifier, AttentiveProbe, AttentiveProbeConfig
from altsight.transfer.base import FitConfig
from altsight.transfer.linear_probe import LARS, LinearClassifier, LinearProbe, LinearProbeConfig
from tests.transfer.test_finetune import TINY, by_metric, folder_of, view_of

FIT = FitConfig(epochs=60, batch=12, workers=0, precision="fp32")


@pytest.fixture
def view() -> View:
    return view_of(TINY)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"data": folder_of(tmp_path / "train", 12), "test": folder_of(tmp_path / "test", 5, offset=100)}


def count_images(view: View) -> list[int]:
    """Return a list that grows by the number of images that the view's encoder sees in each call, but for one alone.

    A single blank image tells how wide the features are.
    """
    seen: list[int] = []
    view.encoder.register_forward_hook(lambda module, images, out: seen.append(len(images[0]) - (len(images[0]) == 1)))
    return seen


def linear(view: View, norm: bool = True, classes: int = 3) -> LinearClassifier:
    return LinearClassifier(LinearProbeConfig("", "mean", "", None, norm), view, classes, key(0, 0, "test"))


def test_the_linear_probe_learns_from_features_that_are_extracted_once(
    view: View, data: dict[str, Any], tmp_path: Path
) -> None:
    seen = count_images(view)
    kept = str(tmp_path / "kept")
    found = by_metric(LinearProbe(**data, features=kept, fit=FIT)(view, tmp_path / "out"))
    top1 = found["top1"]
    assert top1.value is not None and top1.value > 0.9 and top1.low is not None
    assert (top1.n, top1.feature_point, top1.preprocess) == (15, "mean", view.preprocess.hash())
    # A view's encoder is copied for training, so these are all the images that were encoded at all.
    assert sum(seen) == 36 + 15
    LinearProbe(**data, features=kept, norm=False, fit=FIT)(view, tmp_path / "other")
    assert sum(seen) == 36 + 15
    found = by_metric(LinearProbe(**data, features=kept, feature_point="cls", fit=FIT)(view, tmp_path / "cls"))
    assert found["top1"].feature_point == "cls" and sum(seen) == 2 * (36 + 15)


def test_the_linear_probe_with_augmentation_sees_images(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    fit = dataclasses.replace(FIT, epochs=20)
    top1 = by_metric(LinearProbe(**data, augment=True, fit=fit)(view, tmp_path / "out"))["top1"]
    assert top1.value is not None and top1.value > 0.6


def test_the_attentive_probe_learns(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in view.encoder.state_dict().items()}
    fit = dataclasses.replace(FIT, epochs=10)
    # The recipe's rate is for batches of a thousand.
    optim = dataclasses.replace(ADAMW, lr=3e-3, lr_base_batch=0)
    top1 = by_metric(AttentiveProbe(**data, optim=optim, fit=fit)(view, tmp_path / "out"))["top1"]
    assert top1.value is not None and top1.value > 0.9
    assert top1.feature_point == "attention over patches"
    assert all(torch.equal(value, before[name]) for name, value in view.encoder.state_dict().items())


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("kind", [LinearProbe, AttentiveProbe])
def test_probes_train_in_mixed_precision(
    kind: Any, augment: bool, view: View, data: dict[str, Any], tmp_path: Path
) -> None:
    fit = dataclasses.replace(FIT, epochs=1, precision="bf16")
    found = by_metric(kind(**data, augment=augment, fit=fit)(view, tmp_path / "out"))
    assert found["top1"].n == 15
    assert read_json(tmp_path / "out" / "summary.json")["precision"] == "bf16"


def features_of(count: int) -> Batch:
    torch.manual_seed(0)
    tensors = {"features": 3 + 2 * torch.randn(count, 24), "label": torch.arange(count) % 3}
    return Batch(tensors, torch.arange(count), torch.arange(count))


def test_the_loss_is_that_of_normalised_features(view: View) -> None:
    model = linear(view).train()
    batch = features_of(9)
    found = model.loss(model.embed(batch, key(0, 0)).shared)["classification"]
    x = batch["features"].double()
    x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-6).sqrt()
    logits = x @ model.head.weight.double().T + model.head.bias.double()
    rows = range(9)
    expected = -logits.log_softmax(dim=1)[rows, batch["label"]].mean()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_statistics_of_the_norm(view: View, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, batch = linear(view).train(), features_of(16)
    alone = whole.loss(whole.embed(batch, key(0, 0)).shared)["classification"]
    alone.backward()
    total, gradient = torch.zeros(()), torch.zeros_like(whole.head.weight)
    for rank in range(ranks):
        model, part = linear(view).train(), batch.part(rank * 16 // ranks, (rank + 1) * 16 // ranks)
        monkeypatch.setattr(module, "gather", lambda x: batch["features"])
        monkeypatch.setattr(module, "world", lambda rank=rank: World(rank, ranks))
        share = model.loss(model.embed(part, key(0, 0)).shared)["classification"]
        share.backward()
        assert model.head.weight.grad is not None
        total, gradient = total + share.detach(), gradient + model.head.weight.grad
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(model.norm.get_buffer(name), whole.norm.get_buffer(name))
    torch.testing.assert_close(total, alone.detach())
    torch.testing.assert_close(gradient, whole.head.weight.grad)


def test_the_optimizer_is_lars_of_the_papers(view: View) -> None:
    """Momentum 0.9, trust 0.001 for the matrix; the bias moves by plain SGD; nothing decays."""
    model = linear(view)
    optimizer = make_optimizer(model, dataclasses.replace(LARS, lr_base_batch=0), 256)
    weight, bias = model.head.weight.detach().clone().double(), model.head.bias.detach().clone().double()
    speed: list[Tensor] = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(4):
        torch.manual_seed(step)
        gradients = [torch.randn_like(model.head.weight), torch.randn_like(model.head.bias)]
        model.head.weight.grad, model.head.bias.grad = (g.clone() for g in gradients)
        optimizer.step()
        trust = 0.001 * weight.norm() / gradients[0].double().norm()
        speed = [0.9 * speed[0] + trust * gradients[0].double(), 0.9 * speed[1] + gradients[1].double()]
        weight, bias = weight - 0.1 * speed[0], bias - 0.1 * speed[1]
        torch.testing.assert_close(model.head.weight.detach().double(), weight, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(model.head.bias.detach().double(), bias, atol=1e-6, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "convnext_atto"])
def test_features_may_be_wider_than_the_last_stage(model: str, data: dict[str, Any], tmp_path: Path) -> None:
    view = dataclasses.replace(view_of(EncoderConfig(model, img_size=32)), feature_point="pooled")
    found = by_metric(LinearProbe(**data, fit=dataclasses.replace(FIT, epochs=1))(view, tmp_path / "out"))
    assert (found["top1"].n, found["top1"].feature_point) == (15, "pooled")


def test_a_frozen_encoder_keeps_its_statistics() -> None:
    view = view_of(EncoderConfig("test_resnet", img_size=32))
    config = AttentiveProbeConfig("", "", None)
    for model in (linear(view), AttentiveClassifier(config, view, 3, key(0, 0, "test"))):
        model.train()
        assert model.training and not any(child.training for child in model.encoder.modules())


def test_the_pooling_is_the_formula(view: View) -> None:
    model = AttentiveClassifier(AttentiveProbeConfig("", "", None), view, 3, key(0, 0, "test")).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = model.as_view(view).features(images)
    pool, attention = model.pool, model.pool.attention
    assert attention is not None
    with torch.no_grad():
        patches = model.encoder(model.encoder.normalize(images)).patches
        query = attention.query_map(attention.query_norm(attention.query))[0].view(3, 8)
        keys = attention.key_map(attention.key_norm(patches)).view(2, 4, 3, 8)
        values = pool.value(pool.norm(patches)).view(2, 4, 3, 8)
        mixed = torch.zeros(2, 3, 8)
        for image in range(2):
            for head in range(3):
                share = (keys[image, :, head] @ query[head] / 8**0.5).softmax(dim=0)
                mixed[image, head] = share @ values[image, :, head]
        expected = mixed.flatten(1) @ pool.out.weight.T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_micro_batches_do_not_change_the_attentive_probe(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    values = []
    for name, size in (("whole", 0), ("parts", 3)):
        fit = dataclasses.replace(FIT, epochs=2, micro_batch=size)
        AttentiveProbe(**data, fit=fit)(view, tmp_path / name)
        path = max((tmp_path / name / "checkpoints").glob("*.pt"))
        values.append(torch.load(path, weights_only=True)["method"])
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, atol=2e-5, rtol=1e-3)


def test_wrong_use_is_said_in_one_line(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"256 images of a batch at a time anyway: leave --fit.micro-batch at 0"):
        LinearProbe(**data, fit=dataclasses.replace(FIT, micro_batch=4))(view, out)
    with pytest.raises(UserError, match="nowhere"):
        AttentiveProbe(data["data"], str(tmp_path / "nowhere"), fit=FIT)(view, out)
    with pytest.raises(UserError, match="larger than the data set"):
        LinearProbe(**data, optim=OptimConfig())(view, out)
    assert not out.exists()
    with pytest.raises(UserError, match="a batch of 1 has no others"):
        LinearProbe(**data, fit=dataclasses.replace(FIT, batch=1))(view, out)
