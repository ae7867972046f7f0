"""Detection: jitter moves boxes and masks with the pixels, losses fit the contract, AP is pycocotools'."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import altsight
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Image
from altsight.data.coco import Instance, open_coco
from altsight.data.decode import BrokenImage
from altsight.data.scenes import Scenes, run_lengths, write_coco
from altsight.data.views import Crop
from altsight.evals.load import view_of
from altsight.methods.base import Corpus
from altsight.methods.mae import MAE
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.pyramid import SimplePyramid, make_pyramid
from altsight.nn.resample import resized
from altsight.train.accumulate import Accumulator
from altsight.transfer.base import FitConfig
from altsight.transfer.detect import METRICS, as_results, average_precision, evaluate, predict, resampled, sized
from altsight.transfer.detector import Detector, DetectorConfig
from altsight.transfer.jitter import DetectPrepare, boxes_of, fitted, padded, unpacked

SIZE = 64
SMALL = DetectorConfig(width=16, hidden=32, most=4, proposals=40, sampled=16, jitter=(0.5, 1.5))
HOW = FitConfig(epochs=1, batch=4, workers=0, precision="fp32", device="cpu")
VIT = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2, positions="learned")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco(folder, Scenes(8, pixels=SIZE), Scenes(6, seed=1, pixels=SIZE))
    return folder


def view(config: EncoderConfig = VIT) -> Any:
    method = MAE(MAE.Config(), Encoder(config), Corpus())
    method.init_weights(key(0, 0))
    return view_of(method, "mae")


def detector(config: DetectorConfig = SMALL, encoder: Encoder | None = None) -> Detector:
    torch.manual_seed(0)
    return Detector(config, encoder or resized(view().encoder, img_size=SIZE), 6).train()


def batch_of(method: Detector, coco: Path, size: int = 4) -> Batch:
    images, prepare = open_coco(coco, "train2017"), method.prepare(Crop(), SIZE)
    examples = [prepare(images.document(i, key(0, i)), key(0, i)) for i in range(size)]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in examples[0] or {}}
    return Batch(tensors, torch.arange(size), torch.arange(size))


def made_up(height: int, width: int, mask: np.ndarray) -> Document:
    """Return a document whose picture is white where `mask` is and black elsewhere."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)).save(file, "PNG")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
    thing = Instance(2, tuple(map(float, box)), {"size": [height, width], "counts": run_lengths(mask)})  # type: ignore[arg-type]
    return Document((Image(file.getvalue()),), "made up", {"instances": (thing,), "size": (height, width)})


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_stay_on_the_pixels(masks: bool) -> None:
    mask = np.zeros((60, 90), bool)
    mask[20:44, 30:66] = True
    prepare, seen = DetectPrepare(48, "half", masks, (0.4, 1.6), True, 3), 0
    for position in range(60):
        example = prepare(made_up(60, 90, mask), key(1, position))
        assert example is not None and example["image"].shape == (3, 48, 48)
        height, width = example["valid"].tolist()
        assert max(height, width) <= 48 and bool((example["image"][:, height:] == 128).all())
        if not int(example["labels"][0]):
            continue
        seen += 1
        assert example["labels"].tolist() == [3, 0, 0]
        shown = example["image"][0, :height, :width] > 127
        want = boxes_of(shown[None].bool())[0]
        assert torch.allclose(example["boxes"][0], want, atol=1.01), position
        if masks:
            mine = unpacked(example["masks"], 48)[0, :height, :width].bool()
            assert float((mine ^ shown).float().mean()) < 0.03
            assert example["boxes"][0].tolist() == boxes_of(mine[None])[0].tolist()
    assert seen > 40


def test_the_largest_objects_are_kept_and_what_is_out_of_sight_is_not(coco: Path) -> None:
    images = open_coco(coco, "train2017")
    document = next(images.document(i, key(0, i)) for i in range(8) if len(images.instances[i]) > 1)
    whole = DetectPrepare(SIZE, "half", True, (1.0, 1.0), False, 4)(document, key(0, 0))
    few = DetectPrepare(SIZE, "half", True, (1.0, 1.0), False, 1)(document, key(0, 0))
    assert whole is not None and few is not None
    assert int((whole["labels"] > 0).sum()) == len(document.meta["instances"])
    areas = (whole["boxes"][:, 2:] - whole["boxes"][:, :2]).prod(dim=1)
    assert torch.equal(few["boxes"][0], whole["boxes"][areas.argmax()])
    corner = DetectPrepare(16, "half", True, (20.0, 20.0), False, 4)
    counts = {int((e["labels"] > 0).sum()) for i in range(30) if (e := corner(document, key(0, i))) is not None}
    assert 0 in counts, "a window of nothing but background"


def test_an_image_of_another_size_than_annotated_is_refused(coco: Path) -> None:
    document = open_coco(coco, "train2017").document(0, key(0, 0))
    document.meta["size"] = (10, 10)
    with pytest.raises(BrokenImage, match="64 x 64 pixels, annotated as 10 x 10"):
        DetectPrepare(SIZE, "half", True, (1.0, 1.0), True, 4)(document, key(0, 0))


def test_helpers() -> None:
    assert fitted(480, 640, 1024) == (768, 1024) and fitted(1, 5000, 32) == (1, 32)
    image = padded(torch.zeros(3, 2, 3, dtype=torch.uint8), 4, "imagenet")
    assert image[:, 3, 3].tolist() == [124, 116, 104] and int(image[:, :2, :3].max()) == 0
    masks = torch.rand(3, 5, 13) > 0.5
    assert torch.equal(unpacked(torch.from_numpy(np.packbits(masks.numpy(), axis=-1)), 13), masks.byte())


def test_pyramids_have_their_strides() -> None:
    vit = resized(view().encoder, img_size=SIZE)
    cnn = Encoder(EncoderConfig("resnet18", img_size=SIZE, init="timm"))
    for encoder, strides in ((vit, (2, 4, 8, 16, 32)), (cnn, (4, 8, 16, 32, 64))):
        pyramid = make_pyramid(encoder, 16)
        maps = pyramid(encoder(torch.zeros(2, 3, SIZE, SIZE)))
        assert list(maps) == ["0", "1", "2", "3", "pool"] and pyramid.strides == strides
        assert [tuple(m.shape) for m in maps.values()] == [(2, 16, SIZE // s, SIZE // s) for s in strides]


def test_regions_are_pooled_where_they_are() -> None:
    for patch, side in ((8, 8), (14, 16)):
        source = view(dataclasses.replace(VIT, img_size=4 * patch, patch_size=patch)).encoder
        encoder = sized(source, 64, 0.0)
        assert encoder.patch_size == side
        method = detector(encoder=encoder).eval()
        method.detect([small_png()])
        assert method.rcnn.roi_heads.box_roi_pool.scales == [1 / s for s in make_pyramid(encoder, 16).strides[:4]]


def test_the_pyramid_reads_patches_where_they_are() -> None:
    encoder = resized(view().encoder, img_size=SIZE)
    pyramid = SimplePyramid(encoder, 16)
    encoded = encoder(torch.zeros(1, 3, SIZE, SIZE))
    before = pyramid(encoded)["2"]
    encoded.prenorm = encoded.prenorm.clone()
    encoded.prenorm[0, encoded.prefix + 3 * 8 + 5] += 10.0
    moved = (pyramid(encoded)["2"] - before).abs().sum(dim=1)[0] > 1e-6
    rows, columns = moved.nonzero().unbind(dim=1)
    assert rows.unique().tolist() == [2, 3, 4] and columns.unique().tolist() == [4, 5, 6], "a 3 x 3 convolution"


@pytest.mark.parametrize("masks", [True, False])
def test_accumulation_does_not_change_the_gradient(coco: Path, masks: bool) -> None:
    gradients = []
    for micro in (0, 1):
        method = detector(dataclasses.replace(SMALL, masks=masks))
        batch = batch_of(method, coco)
        losses, counts = Accumulator(method, lambda part, at, m=method: m.embed(part, at), 0, micro)(batch)
        assert (
            set(losses)
            == set(counts)
            == {"objectness", "proposals", "classes", "boxes"} | ({"masks"} if masks else set())
        )
        gradients.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    for name, gradient in gradients[0].items():
        assert torch.allclose(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max())
        ), name


def test_images_without_objects_have_finite_losses(coco: Path) -> None:
    method = detector()
    batch = batch_of(method, coco, 2)
    batch.tensors["labels"] = torch.zeros_like(batch["labels"])
    losses, _ = Accumulator(method, lambda part, at: method.embed(part, at), 0)(batch)
    assert float(losses["masks"]) == 0 and all(bool(value.isfinite()) for value in losses.values())


def test_batch_norm_stays_as_it_was_trained() -> None:
    method = detector(encoder=Encoder(EncoderConfig("resnet18", img_size=SIZE, init="timm")))
    norms = [m for m in method.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and method.training


def test_the_metric_is_pycocotools(coco: Path) -> None:
    """The true objects, most of them moved a little and some named wrongly, with random confidence."""
    path, draw = coco / "annotations" / "instances_val2017.json", np.random.default_rng(0)
    found = []
    for row in json.loads(path.read_text())["annotations"]:
        box = np.array(row["bbox"], float) + draw.normal(0, 1.5, 4)
        label = row["category_id"] if draw.random() < 0.7 else 1
        found.append(
            {"image_id": row["image_id"], "category_id": label, "bbox": box.tolist(), "score": float(draw.random())}
        )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        want = COCOeval(truth, truth.loadRes([dict(row) for row in found]), "bbox")
        want.evaluate()
        want.accumulate()
        want.summarize()
    got = evaluate(path, found, "bbox")
    assert got.stats.tolist() == want.stats.tolist() and 0.05 < got.stats[0] < 0.95
    assert average_precision(got.eval["precision"]) == pytest.approx(got.stats[0], abs=1e-12)
    for place, metric in enumerate(METRICS):
        assert average_precision(got.eval["precision"], metric) == pytest.approx(got.stats[place], abs=1e-12)
    intervals = resampled(got, 0)
    low, high = intervals["ap"]
    assert low < got.stats[0] < high and resampled(got, 0) == intervals
    assert got.stats.tolist() == want.stats.tolist(), "the interval leaves the numbers alone"


def test_true_objects_have_an_ap_of_one(coco: Path) -> None:
    images, found = open_coco(coco, "val2017"), list[dict[str, Any]]()
    for picture, things in zip(images.pictures, images.instances, strict=True):
        boxes = torch.tensor([t.box for t in things])
        boxes[:, 2:] += boxes[:, :2]
        labels, masks = [t.label + 1 for t in things], np.stack([t.mask(SIZE, SIZE) for t in things])
        answer = {"boxes": boxes, "labels": torch.tensor(labels), "masks": torch.from_numpy(masks)[:, None]}
        found += as_results(answer | {"scores": torch.ones(len(things))}, picture.id, images.category_ids)
    for kind in ("bbox", "segm"):
        assert evaluate(images.annotations, found, kind).stats[0] == pytest.approx(1.0)
        assert evaluate(images.annotations, [], kind).stats[0] == 0


@pytest.mark.parametrize("model", ["vit", "resnet18"])
def test_the_transfer(coco: Path, tmp_path: Path, model: str) -> None:
    source = view() if model == "vit" else None
    settings: dict[str, Any] = {"data": str(coco), "size": SIZE, "drop_path": 0.0, "detector": SMALL, "fit": HOW}
    if source is None:
        from altsight.methods.simclr import SimCLR

        method = SimCLR(SimCLR.Config(), Encoder(EncoderConfig("resnet18", img_size=SIZE, init="timm")), Corpus())
        method.init_weights(key(0, 0))
        source = view_of(method, "resnet")
        settings["optim"] = dataclasses.replace(Detector.optim, layer_decay=1.0)
    found = altsight.transfer("detect", source, tmp_path, **settings)
    assert [r.metric for r in found[::6]] == ["box_ap", "mask_ap"] and len(found) == 12
    assert all(r.n == 6 and r.split == "val2017" and r.data and r.preprocess for r in found)
    assert isinstance(json.loads((tmp_path / "predictions.json").read_text()), list)
    again = altsight.transfer("detect", source, tmp_path, **settings)
    assert [r.value for r in again] == [r.value for r in found]


def small_png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (12, 10)).save(file, "PNG")
    return file.getvalue()


def test_wrong_use_is_told_in_a_line(coco: Path, tmp_path: Path) -> None:
    def run(data: Path = coco, **settings: Any) -> None:
        fields = {"size": SIZE, "detector": SMALL, "fit": HOW} | settings
        altsight.transfer("detect", view(), tmp_path / "out", data=str(data), **fields)

    with pytest.raises(UserError, match=r"instances_train2017.json' does not exist"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"60 is not divisible by 16, .* set --size 48 or 64"):
        run(size=60)
    for wrong in ({"jitter": (0.0, 1.0)}, {"most": 0}):
        with pytest.raises(UserError, match=r"--detector\.jitter takes"):
            run(detector=dataclasses.replace(SMALL, **wrong))
    with pytest.raises(UserError, match=r"a drop path of 1\.5"):
        run(drop_path=1.5)
    with pytest.raises(UserError, match="set --size 16 or 32"):
        run(size=0)
    folder = tmp_path / "boxes"
    write_coco(folder, Scenes(4, pixels=SIZE), Scenes(2, seed=1, pixels=SIZE))
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"objects without a mask: set --detector.no-masks"):
        run(folder)
    first = folder / "val2017" / "000000000000.jpg"
    for damage, words in (
        (b"no image", "cannot be read"),
        (small_png(), "10 x 12 pixels, and is annotated as 64 x 64"),
    ):
        first.write_bytes(damage)
        with pytest.raises(UserError, match=words):
            predict(detector(), open_coco(folder, "val2017"))
    content["categories"][0]["name"] = "durian"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="list different categories"):
        run(folder)
    assert not (tmp_path / "out").exists()
