"""MUST: masks, views, the teacher, the global batch, and that no label is ever read (specification 5)."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import altsight
from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Batch, Document, Image, Progress
from altsight.data.shapes import CLASSES, Shapes
from altsight.data.sources import Pairs
from altsight.data.views import Crop
from altsight.evals.load import view_of
from altsight.evals.zeroshot import classifier
from altsight.losses.pixels import patchify
from altsight.methods.base import Corpus
from altsight.methods.mae import MAE
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator
from altsight.train.log import read_log
from altsight.train.optim import parameter_groups
from altsight.transfer.base import FitConfig
from altsight.transfer.must import MUST, MUSTConfig, WeakCrop
from altsight.transfer.selftrain import SelfTrain, self_train
from tests.toy import PROMPT, toy_clip

SMALL = MUSTConfig(mask_block=16, warm_steps=4)
HOW = FitConfig(epochs=1, batch=16, workers=0, precision="fp32", device="cpu")


def make(config: MUSTConfig = SMALL, classes: int = 20) -> MUST:
    view = toy_clip()
    weights = classifier(view, CLASSES, (PROMPT,))
    weights = weights if classes == 20 else F.normalize(torch.randn(classes, weights.shape[1]), dim=-1)
    method = MUST(config, view, weights)
    method.init_weights(key(0, 0, "init"))
    return method.train()


def batch_of(method: MUST, size: int = 6) -> Batch:
    prepare, source = method.prepare(Crop(), 32), Shapes(size, 7)
    examples = [prepare(source.document(i, key(0, i)), key(0, i)) for i in range(size)]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in examples[0] or {}}
    return Batch(tensors, torch.arange(size), torch.arange(size))


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Sealed(Mapping[str, Any]):
    """Meta of a document whose labels nobody may look at."""

    def _refuse(self, *_: object) -> NoReturn:
        raise AssertionError("a label was read")

    __getitem__ = __iter__ = __len__ = __contains__ = get = _refuse


@dataclasses.dataclass(frozen=True)
class Unlabelled(Shapes):
    """Shapes that tell their pictures and nothing else."""

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def document(self, i: int, at: Key) -> Document:
        return Document((Image(self.image(i)),), self.name(i), Sealed())  # type: ignore[arg-type]

    def fields(self, i: int) -> NoReturn:
        raise AssertionError("a label was read")

    all_captions = texts = fields


def test_no_label_is_read(tmp_path: Path) -> None:
    settings = SelfTrain("shapes", prompts=(PROMPT,), must=SMALL, fit=HOW)
    method = self_train(toy_clip(), Unlabelled(32), CLASSES, settings, "shapes", tmp_path)
    (line,) = read_log(tmp_path)[-1:]
    assert line["step"] == 2 and 0 <= line["confident"] <= 1 and 1 <= line["classes"] <= 20
    assert math.isfinite(line["loss"]) and not method.training


def test_the_command_reads_labels_of_the_test_set_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shapes(tmp_path / "images", 24)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a label was read")

    def class_name(self: Pairs, fields: Mapping[str, Any]) -> str:
        return refuse() if self.label else ""

    monkeypatch.setattr(Pairs, "fields", refuse)
    monkeypatch.setattr(Pairs, "class_name", class_name)
    settings: dict[str, Any] = {"data": str(folder), "classes": str(tmp_path / "names.txt"), "prompts": (PROMPT,)}
    found = altsight.transfer("selftrain", toy_clip(), tmp_path / "out", **settings, must=SMALL, fit=HOW)
    assert found == []


def write_shapes(folder: Path, size: int) -> Path:
    source = Shapes(size, 3)
    for i in range(size):
        path = folder / source.fields(i)["label"] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.image(i))
    return folder


def test_results_before_and_after(tmp_path: Path) -> None:
    folder = str(write_shapes(tmp_path / "images", 48))
    settings: dict[str, Any] = {"data": folder, "test": folder, "prompts": (PROMPT,), "must": SMALL, "fit": HOW}
    view = toy_clip()
    found = altsight.transfer("selftrain", view, tmp_path / "out", **settings)
    names = [(r.evaluator, r.metric) for r in found]
    stages = ("zeroshot", "selftrain", "selftrain teacher")
    assert names == [(s, m) for s in stages for m in ("top1", "mean_class", "classes_in_use")]
    assert all(r.n == 48 and r.preprocess and r.data and r.feature_point and r.value is not None for r in found)
    images = torch.stack([view.preprocess(Shapes(48, 3).image(i)) for i in range(48)])
    present = sorted({Shapes(48, 3).fields(i)["label"] for i in range(48)})
    answers = (view.encode_image(images) @ classifier(view, present, (PROMPT,)).T).argmax(dim=1)
    right = [present[a] == Shapes(48, 3).fields(i)["label"] for i, a in enumerate(answers.tolist())]
    assert found[0].value == pytest.approx(np.mean(right))
    assert found[2].value == pytest.approx(len(answers.unique()) / len(present))
    again = altsight.transfer("selftrain", view, tmp_path / "out", **settings)
    assert [r.value for r in again] == [r.value for r in found]


def test_at_the_start_the_student_is_the_zero_shot_classifier() -> None:
    method, view = make(), toy_clip()
    images = torch.stack([view.preprocess(Shapes(5).image(i)) for i in range(5)])
    with torch.no_grad():
        vectors = method.tower(method.encoder(method.encoder.normalize(images)))
        got = method.logits(vectors)
    want = 100 * view.encode_image(images) @ classifier(view, CLASSES, (PROMPT,)).T
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(("ratio", "count"), [(0.3, 2), (0.5, 2), (0.51, 3)])
def test_masks_hold_exactly_so_many_squares(ratio: float, count: int) -> None:
    mask = batch_of(make(dataclasses.replace(SMALL, mask_ratio=ratio)))["mask"]
    assert mask.sum(dim=1).tolist() == [4 * count] * 6, "squares of 2 x 2 patches"


def test_the_pixel_loss_looks_at_masked_pixels_only() -> None:
    method = make()
    batch = batch_of(method)
    mask = batch["mask"]
    images = method.encoder.normalize(batch["strong"])
    encoded = method.encoder(images, mask=mask, mask_token=method.mask_token)
    made = method.decoder(method.patch_norm(encoded.prenorm[:, 1:])).detach()
    error = (made - patchify(images, 8)).abs()
    want = error[mask].mean()
    got = method.embed(batch, key(0, 0)).local["pixels"] / method.counts(batch)["pixels"]
    assert torch.allclose(got, want, rtol=1e-5)
    # The visible pixels are no target: what is predicted for them changes nothing.
    assert not torch.allclose(want, error.mean(), rtol=1e-3)


def test_masked_pixels_do_not_enter_the_encoder() -> None:
    method = make().eval()
    batch = batch_of(method)
    noise = torch.randint(0, 256, batch["strong"].shape, dtype=torch.uint8)
    hidden = batch["mask"].unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    other = Batch(
        batch.tensors | {"strong": torch.where(hidden, noise, batch["strong"])}, batch.positions, batch.samples
    )
    with torch.no_grad():
        first, second = (method.embed(b, key(0, 0)).shared["student"] for b in (batch, other))
    assert torch.allclose(first, second, atol=1e-6)


def test_a_batch_without_a_confident_image_has_a_finite_loss() -> None:
    method = make(dataclasses.replace(SMALL, threshold=1.0))
    losses, _ = Accumulator(method, lambda part, at: method.embed(part, at), 0)(batch_of(method))
    assert float(losses["pseudo"]) == 0 and float(method.confident) == 0
    assert all(math.isfinite(float(value)) for value in losses.values())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


def test_accumulation_does_not_change_the_gradient() -> None:
    gradients = []
    for micro in (0, 2):
        method = make(dataclasses.replace(SMALL, scale=20.0, threshold=0.2))
        Accumulator(method, lambda part, at, m=method: m.embed(part, at), 0, micro)(batch_of(method))
        gradients.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys() and "classifier.weight" in whole and "mask_token" in whole
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1)), name


def test_the_teacher_sees_the_weak_view_and_never_trains() -> None:
    method = make()
    batch = batch_of(method)
    method.embed(batch, key(0, 0)).shared["student"].sum().backward()
    assert not method.teacher.training and all(p.grad is None for p in method.teacher.parameters())
    strong = Batch(batch.tensors | {"weak": batch["strong"]}, batch.positions, batch.samples)
    with torch.no_grad():
        outputs = [method.embed(b, key(0, 0)).shared for b in (batch, strong)]
    assert torch.equal(outputs[0]["student"], outputs[1]["student"]), "the student does not see the weak view"
    assert not torch.allclose(outputs[0]["teacher"], outputs[1]["teacher"])


def test_the_teachers_momentum_rises_on_a_line() -> None:
    method = make(dataclasses.replace(SMALL, ema=(0.5, 0.9), warm_steps=4))
    weight = method.teacher["classifier"].weight
    for step, momentum in ((0, 0.5), (2, 0.7), (4, 0.9), (9, 0.9)):
        before = weight.clone()
        with torch.no_grad():
            method.classifier.weight.add_(1.0)
        method.after_step(Progress(step, 10))
        assert torch.allclose(weight, momentum * before + (1 - momentum) * method.classifier.weight, atol=1e-6)


def test_with_many_classes_the_mean_prediction_is_a_running_one() -> None:
    method = make(dataclasses.replace(SMALL, mask_ratio=0.0), classes=600)
    means = []
    for seed in (0, 1):
        vectors = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        loss = method.loss({"student": vectors, "teacher": vectors})["fairness"]
        mean = method.logits(vectors).double().softmax(dim=1).mean(dim=0).detach()
        means.append(mean)
        method.after_step(Progress(seed, 10))
    running = 0.5 * (0.5 * means[0] + means[1])
    assert float(loss.detach()) == pytest.approx(float(-running.log().mean() / 0.5), rel=1e-4)


def test_the_weak_view_is_the_largest_square() -> None:
    boxes = {WeakCrop().box(40, 100, key(0, i)) for i in range(200)}
    assert {(top, height, width) for top, _, height, width in boxes} == {(0, 40, 40)}
    lefts = [left for _, left, _, _ in boxes]
    assert min(lefts) <= 2 and max(lefts) >= 58 and max(lefts) <= 60


def test_views_and_masks_are_functions_of_the_key() -> None:
    prepare = make(dataclasses.replace(SMALL, magnitude=9)).prepare(Crop(), 32)
    document = Document((Image(png(40, 50)),), "noise")
    first, again, other = (prepare(document, key(0, i)) for i in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert all(torch.equal(first[name], again[name]) and first[name].shape == other[name].shape for name in first)
    assert not torch.equal(first["strong"], other["strong"])


def test_what_trains_and_how_fast() -> None:
    method = make()
    names = {name for name, p in method.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "mask_token", "decoder.weight", "encoder.backbone.norm.weight"} <= names
    assert not any(".text." in name or "logit_scale" in name or name.startswith("teacher") for name in names)
    groups = {id(p): group for group in parameter_groups(method, MUST.optim) for p in group["params"]}
    depth = len(method.encoder.backbone.blocks)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            inner = name.startswith("encoder.") and not name.startswith("encoder.backbone.norm.")
            layer = int(name.split(".")[3]) + 1 if ".blocks." in name else 0 if inner else depth + 1
            assert groups[id(parameter)]["lr_scale"] == pytest.approx(0.65 ** (depth + 1 - layer)), name
            assert groups[id(parameter)]["decays"] == (parameter.ndim > 1), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_block": 12}, "whole patches of 8 pixels"),
        ({"mask_block": 24}, "set --must.mask-block"),
        ({"mask_ratio": 0.9}, "leave some of the 4 squares visible"),
    ],
)
def test_masks_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(dataclasses.replace(SMALL, **changes))


def test_wrong_use_is_told_in_a_line(tmp_path: Path) -> None:
    view, folder = toy_clip(), str(write_shapes(tmp_path / "images", 24))

    def run(view: Any = view, **settings: Any) -> None:
        altsight.transfer("selftrain", view, tmp_path / "out", **settings)

    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2)
    alone = view_of(MAE(MAE.Config(), Encoder(config), Corpus()), "mae")
    with pytest.raises(UserError, match="'mae' has no text tower"):
        run(alone, data=folder)
    for change, words in (({"ema": (0.9, 1.1)}, "--must.ema"), ({"scale": 0.0}, "--must.scale")):
        with pytest.raises(UserError, match=words):
            run(data=folder, must=dataclasses.replace(SMALL, **change))
    with pytest.raises(UserError, match="give --classes FILE or --test IMAGES"):
        run(data=folder)
    with pytest.raises(UserError, match="nothing' does not exist"):
        run(data=str(tmp_path / "nothing"), test=folder)
    with pytest.raises(UserError, match="has the label field 'kind'"):
        run(data=folder, test=folder, label="kind")
    (tmp_path / "twice.txt").write_text("red circle\nred circle\n")
    with pytest.raises(UserError, match="twice"):
        run(data=folder, classes=str(tmp_path / "twice.txt"))
    (tmp_path / "few.txt").write_text("red circle\n")
    with pytest.raises(UserError, match="lacks the class"):
        run(data=folder, test=folder, classes=str(tmp_path / "few.txt"))
    assert not (tmp_path / "out").exists()
