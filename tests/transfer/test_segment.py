"""Segmentation from any weights: what is trained, the loss, the results, and wrong use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import altsight
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.mask_views import MaskView
from altsight.data.scenes import Scenes, write_ade20k
from altsight.data.segmentation import IGNORED
from altsight.evals.base import Preprocess, Result, View
from altsight.methods.base import Method
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.optim import parameter_groups
from altsight.transfer.base import FitConfig
from altsight.transfer.segment import AUXILIARY, OPTIM, Segment
from altsight.transfer.segmenter import Segmenter

VIT = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=4, heads=2)
RESNET = EncoderConfig("resnet18", img_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenes") / "made"
    write_ade20k(folder, Scenes(12, pixels=40), Scenes(6, seed=1, pixels=40))
    return str(folder)


def view_of(config: EncoderConfig = VIT) -> View:
    encoder = Encoder(config)
    encoder.init_weights(key(0, 0, "init"))
    return View("toy", encoder.eval(), Preprocess(config.img_size))


def settings(data: str, **changes: object) -> Segment:
    fit = FitConfig(epochs=1, batch=6, workers=0, precision="fp32", device="cpu")
    return replace(Segment(data, size=64, channels=16, fit=fit), **changes)  # type: ignore[arg-type]


def built(data: str, config: EncoderConfig = VIT, **changes: object) -> Segmenter:
    method = settings(data, **changes)._build(view_of(config).encoder, 6)
    return method


def batch(size: int = 64) -> Batch:
    torch.manual_seed(0)
    mask = torch.randint(0, 7, (4, size, size)).to(torch.uint8)
    mask[mask == 6] = IGNORED
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    return Batch({"image": images, "mask": mask}, torch.arange(4), torch.arange(4))


def test_the_loss_is_the_cross_entropy_of_labelled_pixels(data: str) -> None:
    method = built(data, drop_path=0.0).train()
    for module in method.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    given = batch()
    found, counts = method.embed(given, key(0, 0)).local, method.counts(given)
    encoded = method.encoder(method.encoder.normalize(given["image"]))
    logits: dict[str, Tensor] = method.decoder(method.encoder, encoded)
    mask = given["mask"].long()
    for name in ("segmentation", "auxiliary"):
        wide = F.interpolate(logits[name], (64, 64), mode="bilinear", align_corners=False).log_softmax(dim=1)
        inside = mask != IGNORED
        picked = wide.gather(1, mask.clamp(max=5)[:, None])[:, 0][inside]
        assert counts[name] == inside.sum()
        torch.testing.assert_close(found[name] / counts[name], -picked.mean(), rtol=1e-4, atol=1e-5)
    assert method.weights() == {"auxiliary": AUXILIARY}


def test_rates_fall_by_layer_and_the_head_has_the_full_one(data: str) -> None:
    method = built(data)
    scales = {g["lr_scale"] for g in parameter_groups(method, OPTIM)}
    # Four blocks, the embedding below them, and norm and head at 1.
    assert sorted(scales) == pytest.approx([0.65**n for n in (5, 4, 3, 2, 1, 0)])


def trained(data: str, out: Path, config: EncoderConfig = VIT, **changes: object) -> tuple[list[Result], View]:
    view = view_of(config)
    return settings(data, **changes)(view, out), view


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_any_encoder_with_either_head(data: str, tmp_path: Path, config: EncoderConfig, head: str) -> None:
    found, view = trained(data, tmp_path / "out", config, head=head)
    before = {name: value.clone() for name, value in view_of(config).encoder.state_dict().items()}
    after = view.encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the view is left as it was"
    whole, pixels = found
    assert (whole.metric, pixels.metric) == ("miou", "pixel_accuracy")
    for result in found:
        assert result.value is not None and result.low is not None and result.high is not None
        assert 0 <= result.low <= result.value <= result.high <= 1
        assert result.n == 6 and result.split == "validation" and result.extra["seed"] == 0
        assert len(result.data) == 12 and len(result.preprocess) == 12 and result.feature_point
    assert list(whole.extra["iou"]) == list(Scenes(1).names)


def test_the_same_call_again_trains_no_further(data: str, tmp_path: Path) -> None:
    first, _ = trained(data, tmp_path / "out", head="linear")
    log = (tmp_path / "out/log.jsonl").read_text()
    again, _ = trained(data, tmp_path / "out", head="linear")
    assert again == first and (tmp_path / "out/log.jsonl").read_text() == log
    with pytest.raises(UserError, match="another"):
        trained(data, tmp_path / "out", head="linear", size=32)


def test_the_linear_probe_leaves_the_encoder_alone(data: str) -> None:
    method = built(data, RESNET, head="linear").train()
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    losses = method.embed(batch(), key(0, 0)).local
    losses["segmentation"].backward()
    assert all(p.grad is None for p in method.encoder.parameters())
    assert all(p.grad is not None for p in method.decoder.parameters())
    after = method.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "nor do its running statistics move"
    assert method.weights() == {}


def test_multi_scale_needs_no_other_training(data: str, tmp_path: Path) -> None:
    one, _ = trained(data, tmp_path / "out", head="linear", layers=4)
    log = (tmp_path / "out/log.jsonl").read_text()
    many, _ = trained(data, tmp_path / "out", head="linear", layers=4, multi_scale=True)
    assert many[0].preprocess != one[0].preprocess and many[0].data == one[0].data
    assert (tmp_path / "out/log.jsonl").read_text() == log


def test_how_views_are_drawn_is_a_setting_in_python(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size above 0"):
        altsight.transfer("segment", view_of(), tmp_path, data=data, view=MaskView(flip=False), size=0)


def test_views_are_drawn_by_the_key(data: str) -> None:
    prepare = built(data).prepare(crop=None, size=64)  # type: ignore[arg-type]
    assert prepare.size == 64 and prepare.view == MaskView() and prepare.normalization == "imagenet"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 60}, "60 is not divisible by the patch size 8 .* set --size 56 or 64"),
        ({"fit": FitConfig(1, 6, micro_batch=2)}, "a batch cannot be split"),
        ({"fit": FitConfig(1, 60)}, "batch of 60 is larger than the data set"),
        ({"classes": "missing.txt"}, "class file 'missing.txt' cannot be read"),
        ({"data": "missing"}, "class file 'missing/classes.txt' cannot be read"),
        ({"size": 0}, "--size above 0"),
        ({"layers": 4}, "--layers is of the linear head"),
        ({"head": "linear", "layers": 9}, "last 9 layers of 4"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_use_is_one_line(data: str, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        settings(**{"data": data, **changes})(view_of(), tmp_path / "out")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mask_that_was_not_looked_at_stops_the_training_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    write_ade20k(folder, Scenes(70, pixels=32), Scenes(2, seed=1, pixels=32))
    PIL.Image.fromarray(np.full((32, 32), 77, np.uint8)).save(folder / "annotations/training/000069.png")
    with pytest.raises(UserError, match=r"000069.png' has the label 77"):
        settings(str(folder), fit=FitConfig(1, 10, workers=0))(view_of(), tmp_path / "out")


def test_a_segmenter_is_a_method(data: str) -> None:
    assert isinstance(built(data), Method) and built(data).least_batch == 2
