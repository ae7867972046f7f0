"""Fine-tuning: the recipe's parts, what it scores, resuming, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import altsight
from altsight.core.config import OptimConfig, read_json
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.evals.base import Preprocess, Result, View
from altsight.evals.bootstrap import hits_of
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.loop import Stopped
from altsight.train.optim import parameter_groups
from altsight.transfer.augment import Augment, Mixing
from altsight.transfer.base import FitConfig
from altsight.transfer.finetune import Classifier, Finetune, FinetuneConfig, FinetunePrepare
from altsight.transfer.labels import Labels, open_labelled

TINY = EncoderConfig("vit_tiny_patch16_224", img_size=16, patch_size=8, width=24, depth=2, heads=3)
COLOURS = {"blue": (20, 20, 230), "green": (20, 230, 20), "red": (230, 20, 20)}
FIT = FitConfig(epochs=2, batch=8, workers=0, precision="fp32")
QUICK: dict[str, Any] = {
    "augment": Augment(rand_augment="", erase=0.0),
    "mixing": Mixing(0.0, 0.0),
    "optim": OptimConfig(lr=3e-3, lr_base_batch=0, warmup_fraction=0.1),
}


@pytest.fixture
def view() -> View:
    return view_of(TINY)


def view_of(config: EncoderConfig) -> View:
    encoder = Encoder(config)
    encoder.init_weights(key(0, 0, "init"))
    return View("tiny", encoder.eval(), Preprocess(config.img_size), batch_size=16)


def png(colour: tuple[int, ...], i: int = 0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(i).integers(-15, 16, (20, 24, 3))
    PIL.Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def folder_of(path: Path, count: int, names: tuple[str, ...] = tuple(COLOURS), offset: int = 0) -> str:
    """Write `count` images of each colour to a folder for each, and return its path."""
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(count):
            (path / name / f"{i}.png").write_bytes(png(COLOURS[name], offset + i))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"data": folder_of(tmp_path / "train", 12), "test": folder_of(tmp_path / "test", 5, offset=100)}


def config_of(**changes: Any) -> FinetuneConfig:
    return dataclasses.replace(FinetuneConfig("", 16, 0.0, "mean", False, 0.1, Augment(), Mixing()), **changes)


def classifier(encoder: Encoder, classes: int = 3, **changes: Any) -> Classifier:
    return Classifier(config_of(img_size=encoder.config.img_size, **changes), encoder, classes, key(0, 0, "test"))


def by_metric(results: list[Result], split: str = "test") -> dict[str, Result]:
    return {result.metric: result for result in results if result.split == split}


def test_it_learns_and_says_what_its_numbers_are(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in view.encoder.state_dict().items()}
    fit = dataclasses.replace(FIT, epochs=12)
    found = Finetune(**data, val=data["data"], **QUICK, fit=fit)(view, tmp_path / "out")
    assert [(r.split, r.metric) for r in found] == [
        (split, metric) for split in ("val", "test") for metric in ("top1", "mean_class")
    ]
    top1 = by_metric(found)["top1"]
    assert top1.value is not None and top1.value > 0.9 and top1.low is not None
    assert (top1.n, top1.chance, top1.extra["seed"], top1.feature_point) == (15, 1 / 3, 0, "mean_prenorm")
    assert len(top1.data) == 12 and len(top1.preprocess) == 12 and hits_of(top1).mean() == top1.value
    assert all(torch.equal(value, before[name]) for name, value in view.encoder.state_dict().items())


def test_what_is_written_classifies_elsewhere(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = Finetune(**data, **QUICK, fit=dataclasses.replace(FIT, epochs=6))(view, out)
    tuned = altsight.load(out / "encoder.safetensors")
    with safe_open(out / "classifier.safetensors", "pt") as file:
        names = json.loads(file.metadata()["classes"])
    state, images = load_file(out / "classifier.safetensors"), sorted(Path(data["test"]).rglob("*.png"))
    features = tuned.features(images)
    normed = torch.nn.functional.layer_norm(features, (24,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    answers = (normed @ state["head.weight"].T + state["head.bias"]).argmax(dim=1)
    hits = [names[answer] == path.parent.name for answer, path in zip(answers.tolist(), images, strict=True)]
    assert np.mean(hits) == by_metric(found)["top1"].value


def test_logits_of_features_are_those_of_images(view: View) -> None:
    model = classifier(view.encoder).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features = model.as_view(view, 1.0).features(images)
    with torch.no_grad():
        tokens = model.encoder(model.encoder.normalize(images)).prenorm[:, 1:]
        expected = model.head(torch.nn.functional.layer_norm(tokens.mean(dim=1), (24,), eps=1e-6))
    torch.testing.assert_close(model.logits(features), expected)


def test_all_classes_are_equally_likely_at_the_start(view: View) -> None:
    model = classifier(view.encoder, classes=1000)
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert float(model.logits(torch.randn(4, 24)).abs().max()) < 1e-3


def test_rates_fall_by_layers_and_what_must_not_decay_does_not(view: View) -> None:
    model = classifier(view.encoder)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, weight_decay=0.05))
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    depth = 2
    assert named["encoder.backbone.patch_embed.proj.weight"] == (0.5 ** (depth + 1), 0.05)
    assert named["encoder.backbone.cls_token"] == named["encoder.backbone.pos_embed"] == (0.5 ** (depth + 1), 0)
    assert named["encoder.backbone.blocks.0.attn.qkv.weight"] == (0.5**depth, 0.05)
    assert named["encoder.backbone.blocks.1.attn.qkv.bias"] == (0.5 ** (depth - 1), 0)
    assert named["head.weight"] == (1, 0.05) and named["head.bias"] == (1, 0) and named["norm.weight"] == (1, 0)
    assert not any(name.startswith("encoder.backbone.norm") for name in named), "the norm that is replaced is not used"


@pytest.mark.parametrize(
    ("config", "pool"),
    [
        (TINY, "mean"),
        (TINY, "cls"),
        (EncoderConfig("vit_so150m_patch16_reg4_map_256", img_size=32, width=64, depth=2, heads=2), "mean"),
        (EncoderConfig("convnext_atto", img_size=32), "mean"),
        (EncoderConfig("mobilenetv3_small_050", img_size=32), "mean"),
    ],
)
def test_every_trained_parameter_gets_a_gradient(config: EncoderConfig, pool: Any) -> None:
    size = config.img_size
    model = classifier(view_of(config).encoder, pool=pool)
    torch.nn.init.normal_(model.head.weight)
    tensors = {"image": torch.randn(4, 3, size, size), "target": torch.eye(4)[:, :3]}
    batch = Batch(tensors, torch.arange(4), torch.arange(4))
    model.embed(batch, key(0, 0, "step")).local["classification"].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_the_formula(view: View, several: bool) -> None:
    torch.manual_seed(0)
    model = classifier(view.encoder, multi_label=several).eval()
    torch.nn.init.normal_(model.head.weight, std=3)
    images, target = torch.randn(4, 3, 16, 16), torch.rand(4, 3)
    batch = Batch({"image": images, "target": target}, torch.arange(4), torch.arange(4))
    with torch.no_grad():
        found = float(model.embed(batch, key(0, 0, "step")).local["classification"])
        x = model.logits(model.encoder.point(model.encoder(images), "mean_prenorm")).double().numpy()
    t = target.double().numpy()
    if several:
        expected = (t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)).mean(axis=1).sum()
    else:
        expected = -(t * (x - np.log(np.exp(x).sum(axis=1, keepdims=True)))).sum()
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(model.counts(batch)["classification"]) == 4


def examples(folder: str, count: int, **changes: Any) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
    """Yield (class ids, example) of the first images as a run sees them."""
    config = config_of(**changes)
    labels = Labels("label", config.multi_label)
    source = dataclasses.replace(open_labelled(folder, labels), partners=config.mixing.is_on)
    prepare = FinetunePrepare(config, len(source.classes), 16, "imagenet")
    for i in range(count):
        document = source.document(i, key(0, i))
        example = prepare(document, key(0, i))
        assert example is not None
        yield document.meta["classes"], example


def test_targets_are_smoothed_and_mixed(data: dict[str, Any]) -> None:
    for (own,), example in examples(data["data"], 20, mixing=Mixing(0, 0)):
        expected = torch.full((3,), 0.1 / 3)
        expected[own] += 0.9
        torch.testing.assert_close(example["target"], expected)
        assert example["image"].shape == (3, 16, 16) and example["image"].dtype == torch.float32
    mixed = [example["target"] for _, example in examples(data["data"], 36)]
    assert all(float(target.sum()) == pytest.approx(1) for target in mixed)
    assert sum(int((target > 0.04).sum()) == 2 for target in mixed) > 12, "partners are drawn from all classes"


def test_what_an_image_is_mixed_with_depends_on_its_position_alone(data: dict[str, Any]) -> None:
    first = [example for _, example in examples(data["data"], 8)]
    again = [example for _, example in examples(data["data"], 8)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["target"], other["target"])


def weights(out: Path) -> dict[str, Tensor]:
    path = max((out / "checkpoints").glob("*.pt"))
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["method"]
    return found


def test_micro_batches_do_not_change_what_is_learned(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    for name, size in (("whole", 0), ("parts", 2)):
        fit = dataclasses.replace(FIT, micro_batch=size)
        Finetune(**data, drop_path=0.0, optim=QUICK["optim"], fit=fit)(view, tmp_path / name)
    parts = weights(tmp_path / "parts")
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=1e-3)


class StopsAfter(list[int]):
    """Signals that have come once they were looked at `steps` times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def test_a_stopped_training_goes_on_to_the_same_bits(
    view: View, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = Finetune(**data, optim=QUICK["optim"], fit=FIT)
    whole = tune(view, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("altsight.train.loop.stop_signals", lambda: contextlib.nullcontext(StopsAfter(4)))
        tune(view, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "summary.json").exists()
    assert tune(view, tmp_path / "stopped") == whole
    assert read_json(tmp_path / "stopped" / "summary.json")["samples_seen"] == 72
    stopped = weights(tmp_path / "stopped")
    assert all(torch.equal(stopped[name], value) for name, value in weights(tmp_path / "whole").items())
    with pytest.raises(UserError, match="holds another run"):
        dataclasses.replace(tune, label_smoothing=0.0)(view, tmp_path / "stopped")
    with pytest.raises(UserError, match="holds another run"):
        tune(view_of(dataclasses.replace(TINY, init="timm")), tmp_path / "stopped")


def test_the_averaged_weights_are_scored(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    optim = dataclasses.replace(QUICK["optim"], ema=0.999999)
    slow = Finetune(**data, **QUICK | {"optim": optim}, fit=dataclasses.replace(FIT, epochs=12))
    top1 = by_metric(slow(view, tmp_path / "ema"))["top1"]
    assert top1.value is not None and top1.value < 0.7, "an average that hardly moves has learned nothing"


def test_it_learns_in_mixed_precision(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    fit = dataclasses.replace(FIT, epochs=12, precision="bf16")
    top1 = by_metric(Finetune(**data, **QUICK, fit=fit)(view, tmp_path / "out"))["top1"]
    assert top1.value is not None and top1.value > 0.9


def test_another_image_size_interpolates_positions(view: View, data: dict[str, Any], tmp_path: Path) -> None:
    (top1, _) = Finetune(**data, **QUICK, img_size=32, fit=FIT)(view, tmp_path / "large")
    assert weights(tmp_path / "large")["encoder.backbone.pos_embed"].shape == (1, 1 + 16, 24)
    assert top1.preprocess == Preprocess(32, crop_ratio=0.875).hash()


def test_other_backbones_are_tuned_without_layers(data: dict[str, Any], tmp_path: Path) -> None:
    view = view_of(EncoderConfig("test_resnet", img_size=32))
    (top1, _) = Finetune(**data, **QUICK, fit=FIT)(view, tmp_path / "out")
    assert top1.feature_point == "pooled"
    with pytest.raises(UserError, match=r"'test_resnet' has no layers that are counted: use --optim.layer-decay 1"):
        Finetune(**data, fit=FIT)(view, tmp_path / "other")


def tar_of(path: Path, labels: list[Any], grey: bool = False) -> str:
    """Write an image for each label, of the colours that it names, or grey."""
    with tarfile.open(path, "w") as tar:
        for i, value in enumerate(labels):
            names = [] if grey else value if isinstance(value, list) else value.split("|")
            colour = np.array([COLOURS[name] for name in names if name] or [(120, 120, 120)]).max(axis=0)
            for suffix, content in (("png", png(tuple(colour), i)), ("json", json.dumps({"kinds": value}).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("written", ["list", "text"])
def test_several_labels(view: View, tmp_path: Path, written: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [[name for name in COLOURS if rng.random() < 0.4] for _ in range(80)]
    labels = drawn if written == "list" else ["|".join(names) for names in drawn]
    train, test = tar_of(tmp_path / "train.tar", labels[:48]), tar_of(tmp_path / "test.tar", labels[48:])
    fit = dataclasses.replace(FIT, epochs=15)
    tune = Finetune(train, test, label="kinds", multi_label=True, separator="|", **QUICK, fit=fit)
    (result,) = tune(view, tmp_path / "out")
    assert (result.metric, result.n) == ("map", 32)
    assert result.value is not None and result.chance is not None and result.low is not None
    assert result.value > 0.85 and result.low > result.chance
    assert result.chance == pytest.approx(np.mean([len(names) / 3 for names in drawn[48:]]))


def test_wrong_use_is_said_in_one_line_before_anything_is_written(
    view: View, data: dict[str, Any], tmp_path: Path
) -> None:
    train, test, out = data["data"], data["test"], tmp_path / "out"
    single = folder_of(tmp_path / "single", 9, ("red",))
    unknown = folder_of(tmp_path / "unknown", 2, ("red", "green"))
    Path(unknown, "green").rename(Path(unknown, "greem"))
    untold = tar_of(tmp_path / "untold.tar", ["red", "green"] * 8)
    lists = tmp_path / "lists.jsonl"
    lists.write_text("".join(f'{{"path": "single/red/{i}.png", "kinds": ["red", "{i}"]}}\n' for i in (0, 1)))
    cases: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("nowhere", (str(tmp_path / "nowhere"), test), {}),
        ("nowhere", (train, str(tmp_path / "nowhere")), {}),
        ("a single class, 'red'", (single, test), {}),
        (r"the class 'greem', which the training images do not have.*'green'", (train, unknown), {}),
        ("label", (untold, test), {}),
        ("no image of .* has a class in the field 'colour'", (untold, test), {"label": "colour", "multi_label": True}),
        (
            "images of 20 pixels cannot be cut into patches of 8: use --img-size 16 or 24",
            (train, test),
            {"img_size": 20},
        ),
        ("no side of -8 pixels", (train, test), {"img_size": -8}),
        ("crop_ratio is the share .* not 0", (train, test), {"crop_ratio": 0.0}),
        ("drop_path is a share .* not 1.5", (train, test), {"drop_path": 1.5}),
        ("label_smoothing is a share", (train, test), {"label_smoothing": 2.0}),
        ("the field 'kinds' of .*lists", (str(lists), test), {"label": "kinds"}),
    ]
    for message, paths, settings in cases:
        with pytest.raises(UserError, match=message) as caught:
            Finetune(paths[0], paths[1], fit=FIT, **settings)(view, out)
        assert "\n" not in str(caught.value)
        assert not out.exists(), message
    with pytest.raises(UserError, match="no RandAugment policy 'much'"):
        Augment(rand_augment="much")
