"""MI-Zero: the invariants and effects of specification 1.9, and what the transfer writes and refuses."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from altsight.cli import run
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.canvas import emoji, write_canvas, write_canvases
from altsight.data.slide import open_slide
from altsight.evals.base import View
from altsight.evals.zeroshot import classifier
from altsight.transfer.medians import median_interval, spreads
from altsight.transfer.pooling import neighbours, pooled, smooth, top_k
from altsight.transfer.prompt_sets import class_vectors, draw_bank, read_bank
from altsight.transfer.slide_features import TileConfig, slide_features
from altsight.transfer.slides import Slides
from tests.toy import PROMPT, toy_clip

TEMPLATES = (PROMPT, "{}", "there is a {}")


@pytest.fixture(scope="module")
def view() -> View:
    return toy_clip()


@pytest.fixture(scope="module")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two canvases of 256 pixels for each of two classes: three objects in 64 tiles."""
    folder = tmp_path_factory.mktemp("canvases")
    drawn = {
        name: [np.full((20, 20, 3), colour, np.uint8)]
        for name, colour in (("red", (220, 50, 50)), ("blue", (50, 80, 220)))
    }
    write_canvases(folder, drawn, count=2, side=256, targets=3, cell=32)
    return folder


def cosines(n: int = 400, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.from_numpy(key(seed, 0, "cosines").generator().normal(0.2, 0.05, (n, classes)))


def places(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) * 256


def test_order_of_the_tiles_changes_nothing() -> None:
    scores, coords = cosines(), places(20)
    order = torch.from_numpy(np.random.default_rng(1).permutation(400))
    first = pooled(scores, neighbours(coords, 8), (1, 5, 50))
    second = pooled(scores[order], neighbours(coords[order.numpy()], 8), (1, 5, 50))
    assert set(first) == {p + w for p in ("", "smooth ") for w in ("top1", "top5", "top50", "mean")}
    for way, value in first.items():
        torch.testing.assert_close(second[way], value, atol=1e-12, rtol=0)


def test_top_k_is_what_its_formula_says() -> None:
    scores = cosines(30)
    found = top_k(scores, (1, 4, 30, 500))
    columns = [sorted(column, reverse=True) for column in scores.T.tolist()]
    for k in (1, 4, 30):
        torch.testing.assert_close(found[k], torch.tensor([sum(c[:k]) / k for c in columns], dtype=torch.float64))
    assert torch.equal(found[1], scores.max(dim=0).values)
    torch.testing.assert_close(found[30], scores.mean(dim=0))
    assert torch.equal(found[30], found[500]), "fewer tiles than K"


def test_every_class_has_its_own_best_tiles() -> None:
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.0, 0.6]])
    torch.testing.assert_close(top_k(scores, (2,))[2], torch.tensor([0.85, 0.65]))


def test_smoothing() -> None:
    coords, scores = places(20), cosines()
    assert torch.equal(smooth(scores, neighbours(coords, 1)), scores), "one neighbour, itself"
    constant = torch.full((400, 3), 0.25)
    assert torch.equal(smooth(constant, neighbours(coords, 8)), constant)
    index = neighbours(coords, 5)
    middle = 20 * 10 + 10
    assert sorted(index[middle].tolist()) == sorted([middle, middle - 1, middle + 1, middle - 20, middle + 20])
    without = neighbours(coords, 4, include_self=False)
    assert sorted(without[middle].tolist()) == sorted([middle - 1, middle + 1, middle - 20, middle + 20])
    assert neighbours(coords[:1], 8).tolist() == [[0]] and neighbours(coords[:3], 8).shape == (3, 3)


def accuracies(objects: int, gain: float, trials: int = 300) -> dict[int, float]:
    """Return K -> accuracy on pictures of 400 tiles and 3 classes, `objects` of which show the class by `gain` more."""
    ks = (1, 5, 20, 50, 400)
    hits = dict.fromkeys(ks, 0)
    for seed in range(trials):
        rng = key(seed, 0, "tiles").generator()
        scores, label = rng.normal(0.2, 0.05, (400, 3)), int(rng.integers(3))
        # Classes differ in how much any tile resembles them, which is what makes the mean over tiles fail.
        scores += rng.normal(0, 0.02, 3)
        scores[rng.permutation(400)[:objects], label] += gain
        for k, value in top_k(torch.from_numpy(scores), ks).items():
            hits[k] += int(value.argmax()) == label
    return {k: found / trials for k, found in hits.items()}


def test_top_k_beats_the_mean_where_the_object_is_small_only() -> None:
    one, few, some, everywhere = (accuracies(objects, gain=0.25) for objects in (1, 4, 20, 400))
    print(f"objects in 1, 4, 20 and 400 of 400 tiles: {one} {few} {some} {everywhere}")
    assert one[1] > one[5] > one[50] > one[400] and one[400] < 0.5
    assert few[5] > 0.98 and few[400] < 0.5, "1 % of the area"
    assert some[50] > 0.98 and some[400] < 0.7
    # Where the target is everywhere nothing is gained by looking at the best tiles.
    assert min(everywhere.values()) == everywhere[400] == 1.0


def test_the_best_k_grows_with_the_number_of_object_tiles() -> None:
    """Objects so faint that a single tile is no proof."""
    found = [accuracies(objects, gain=0.1) for objects in (1, 20, 100)]
    print(f"faint objects in 1, 20 and 100 of 400 tiles: {found}")
    best = [max(accuracy, key=accuracy.__getitem__) for accuracy in found]
    assert best[0] == 1 and best == sorted(best) and best[2] >= 5
    assert found[2][20] > found[2][1], "20 of 100 tiles tell more than one"


def test_smoothing_rescues_the_best_tile_from_outliers() -> None:
    coords = places(24)
    index, hits = neighbours(coords, 8), {"top1": 0, "smooth top1": 0, "top5": 0, "smooth top5": 0}
    for seed in range(200):
        rng = key(seed, 0, "field").generator()
        scores, label = rng.normal(0.2, 0.03, (24, 24, 3)), int(rng.integers(3))
        top, left = rng.integers(0, 21, 2)
        scores[top : top + 3, left : left + 3, label] += 0.2
        for y, x, outlier in rng.integers(0, (24, 24, 3), (6, 3)):
            scores[y, x, outlier] += 0.4
        found = pooled(torch.from_numpy(scores.reshape(-1, 3)), index, (1, 5))
        for way in hits:
            hits[way] += int(found[way].argmax()) == label
    assert hits["top1"] / 200 < 0.6 and hits["smooth top1"] / 200 > 0.95
    assert hits["smooth top5"] / 200 > max(0.95, hits["top5"] / 200)


def test_prompt_sets_are_drawn_by_a_seed_and_stored(view: View, tmp_path: Path) -> None:
    classes = {"red circle": ("red circle", "round red thing"), "blue cross": ("blue cross",)}
    bank = draw_bank(TEMPLATES, classes, 50, seed=3)
    assert bank == draw_bank(TEMPLATES, classes, 50, seed=3) != draw_bank(TEMPLATES, classes, 50, seed=4)
    assert {len(s.templates) for s in bank.sets} == {1, 2, 3}
    assert all(len(set(s.templates)) == len(s.templates) for s in bank.sets), "without replacement"
    assert {s.names["red circle"] for s in bank.sets} == {("red circle",), ("round red thing",)}
    bank.save(tmp_path / "prompts.json")
    assert read_bank(tmp_path / "prompts.json", ["blue cross", "red circle"]) == bank
    with pytest.raises(UserError, match="other classes"):
        read_bank(tmp_path / "prompts.json", ["red circle"])
    vectors = class_vectors(view, bank.sets, list(classes))
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(50, 2))
    for found, matrix in zip(bank.sets[:5], vectors, strict=False):
        names = [found.names[label][0] for label in classes]
        torch.testing.assert_close(matrix, classifier(view, names, found.templates), atol=1e-6, rtol=0)


def test_medians_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 12 + [1] * 5 + [2] * 3)
    scores = torch.from_numpy(rng.normal(0, 1, (7, 20, 3)))
    scores[:, np.arange(20), labels] += 1
    found = spreads(scores, labels, 10.0, seed=0)
    balanced = [balanced_accuracy_score(labels, s.argmax(1)) for s in scores.numpy()]
    assert found["balanced_accuracy"].median == pytest.approx(np.median(balanced), abs=1e-12)
    assert found["accuracy"].quartiles()["max"] == pytest.approx(
        max((s.argmax(1) == labels).mean() for s in scores.numpy())
    )
    assert found["accuracy"].low is not None and found["accuracy"].low < found["accuracy"].median
    assert set(spreads(scores[:, :17], labels[:17], 10.0, 0)) == {"accuracy", "balanced_accuracy"}, "a class is missing"


def test_interval_of_one_set_is_that_of_a_mean() -> None:
    hits = np.array([[True] * 30 + [False] * 10])
    low, high = median_interval(hits, np.zeros(40, int))
    assert low == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)
    assert high == pytest.approx(0.75 + 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)


def slides(folder: Path, **changes: object) -> Slides:
    settings = Slides(folder, folder / "classes.txt", TEMPLATES, sets=4, topk=(1, 3), tiles=TileConfig(tile=32))
    return replace(settings, **changes)  # type: ignore[arg-type]


def test_labelled_slides(view: View, canvases: Path, tmp_path: Path) -> None:
    results = slides(canvases, heatmaps=1)(view, tmp_path / "out")
    ways = [p + w for p in ("", "smooth ") for w in ("top1", "top3", "mean")]
    assert [r.metric for r in results] == [f"{w} {m}" for w in ways for m in ("accuracy", "balanced_accuracy", "auc")]
    for result in results:
        assert result.n == 4 and result.preprocess and result.data and result.split and result.feature_point
        assert result.extra["seed"] == 0 and len(result.extra["values"]) == 4 and result.chance == 0.5
    assert results[0].low is not None
    assert len(json.loads((tmp_path / "out/prompts.json").read_text())["sets"]) == 4
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert len(rows) == 4 * 6 and set(rows[0]) == {"path", "label", "pooling", "red", "blue"}
    (drawn,) = (tmp_path / "out/heatmaps").iterdir()
    assert PIL.Image.open(drawn).width > 3 * 200
    again = slides(canvases, prompts=tmp_path / "out/prompts.json", sets=9)(view, tmp_path / "again")
    assert [r.value for r in again] == [r.value for r in results], "asked in the same words"


def test_one_slide_and_its_heat_map(view: View, canvases: Path, tmp_path: Path) -> None:
    settings = slides(canvases, data=canvases / "red" / "000.tif")
    results = settings(view, tmp_path)
    assert [r.metric for r in results] == ["top1", "top3", "mean", "smooth top1", "smooth top3", "smooth mean"]
    assert results[0].value == max(results[0].extra["scores"].values()) and "red" in results[0].note
    assert len(list((tmp_path / "heatmaps").iterdir())) == 1


def test_heat_map_is_hot_where_the_object_lies(view: View, tmp_path: Path) -> None:
    drawing = np.full((32, 32, 3), (220, 50, 50), np.uint8)
    ((left, top),) = write_canvas(tmp_path / "a.tif", 512, [drawing], 32, seed=5)
    (tmp_path / "names.txt").write_text("red square\n")
    settings = slides(tmp_path, data=tmp_path / "a.tif", classes=tmp_path / "names.txt")
    settings(view, tmp_path / "out")
    (drawn,) = (tmp_path / "out/heatmaps").iterdir()
    picture = np.asarray(PIL.Image.open(drawn)).astype(int)
    under = picture[22 + top + 8 : 22 + top + 24, 520 + left + 8 : 520 + left + 24].mean(axis=(0, 1))
    assert under[0] > under[2] + 100, "the tile with the object is red"
    assert np.median(picture[22:, 520:, 2]) > np.median(picture[22:, 520:, 0]), "most others are blue"


def test_features_are_stored_and_noticed_to_be_old(
    view: View, canvases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = canvases / "red" / "000.tif", TileConfig(tile=32)
    first = slide_features(view, path, config, 16, tmp_path)
    calls: list[int] = []
    vectors = View.vectors

    def counted(self: View, images: Tensor) -> tuple[Tensor, Tensor | None]:
        calls.append(len(images))
        return vectors(self, images)

    monkeypatch.setattr(View, "vectors", counted)
    again = slide_features(view, path, config, 16, tmp_path)
    assert not calls and torch.equal(again.vectors, first.vectors) and np.array_equal(again.coords, first.coords)
    assert first.vectors.shape == (64, 64) and first.features.shape == (64, 64)
    slide_features(view, path, replace(config, stride=16), 16, tmp_path)
    assert calls and max(calls) == 16, "never more than a batch of tiles"
    calls.clear()
    other = toy_clip()
    with torch.no_grad():
        next(other.encoder.parameters()).add_(0.1)
    slide_features(other, path, replace(config, stride=16), 16, tmp_path)
    assert calls, "other weights"


def test_coordinates_outside_of_the_slide_are_refused(view: View, canvases: Path, tmp_path: Path) -> None:
    config = TileConfig(tile=32, coords=tmp_path / "a.npy")
    for left, top in ((256, 0), (0, -1)):
        np.save(tmp_path / "a.npy", np.array([[0, 0], [left, top]]))
        with pytest.raises(UserError, match=rf"a tile at \({left}, {top}\), outside of the slide .* of 256 x 256"):
            slide_features(view, canvases / "red" / "000.tif", config, 16, tmp_path)


def test_vectors_do_not_depend_on_the_batch_of_tiles(view: View, canvases: Path, tmp_path: Path) -> None:
    path = canvases / "blue" / "001.tif"
    one, many = (slide_features(view, path, TileConfig(tile=32), b, tmp_path / str(b)) for b in (7, 64))
    torch.testing.assert_close(one.vectors, many.vectors, atol=1e-5, rtol=0)


def test_emoji_on_a_canvas_lie_where_it_is_said(tmp_path: Path) -> None:
    (drawings,) = emoji(["red apple"], 40).values()
    ((left, top),) = write_canvas(tmp_path / "a.tif", 700, drawings[:1], 64, seed=0)
    read = open_slide(tmp_path / "a.tif").read(int(left), int(top), 0, 40)
    cover = drawings[0][..., 3] == 255
    difference = np.abs(read[:40, : cover.shape[1]].astype(int)[cover[:40]] - drawings[0][..., :3].astype(int)[cover])
    assert difference.mean() < 20, "but for the loss of JPEG"
    with pytest.raises(UserError, match="larger canvas"):
        write_canvas(tmp_path / "b.tif", 64, drawings, 64, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "none.txt"}, "none.txt"),
        ({"classes": "twice.txt"}, "'red' twice"),
        ({"classes": "more.txt"}, "'green' has no folder"),
        ({"data": "missing"}, "does not exist"),
        ({"templates": ("a slide",)}, "needs one {}"),
        ({"sets": 0}, "--sets 1"),
        ({"batch": 0}, "--batch"),
        ({"topk": ()}, "--topk"),
        ({"topk": (5, 0)}, "--topk"),
        ({"neighbours": 0}, "--neighbours"),
        ({"tiles": TileConfig(magnification=0)}, "--tiles.magnification"),
        ({"tiles": TileConfig(stride=-1)}, "--tiles.stride"),
        ({"tiles": TileConfig(tile=512)}, "lower --tiles.tile"),
        ({"tiles": TileConfig(tile=32, coords=Path("none.npy"))}, "none.npy"),
    ],
)
def test_wrong_use_is_one_line(
    view: View, canvases: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    (tmp_path / "twice.txt").write_text("red\nblue\nred\n")
    (tmp_path / "more.txt").write_text("red\nblue\ngreen\n")
    places_ = {name: tmp_path / str(changes[name]) for name in ("classes", "data") if name in changes}
    with pytest.raises(UserError, match=message) as error:
        slides(canvases, **{**changes, **places_})(view, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_view_without_text_is_refused(view: View, canvases: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text tower"):
        slides(canvases)(replace(view, text=None), tmp_path / "out")


def test_command_line_shows_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["transfer", "slides", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--tiles.magnification" in shown and "--topk" in shown
