"""Text4Vis: the invariants of specification 4.8, class matrices, protocols, and what the transfer refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from altsight.cli import run
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.clips import write_video
from altsight.data.shapes import CLASSES
from altsight.data.video import read_frames
from altsight.data.views import Crop
from altsight.evals.base import View
from altsight.evals.zeroshot import classifier
from altsight.nn.temporal import TemporalTransformer
from altsight.train.optim import parameter_groups
from altsight.transfer.base import FitConfig, ImageTower
from altsight.transfer.classifiers import discriminants, normal, orthogonal
from altsight.transfer.text4vis import TemporalConfig, Text4Vis
from altsight.transfer.video import Video
from altsight.transfer.video_scores import crops, half_classes
from tests.toy import PROMPT, toy_clip
from tests.transfer.shape_videos import shape_video, write_shape_videos

FEW = CLASSES[:6]
FRAMES = 4


@pytest.fixture(scope="module")
def view() -> View:
    return toy_clip()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and test: three and four videos of six classes."""
    folder = tmp_path_factory.mktemp("videos")
    write_shape_videos(folder / "train", 3, seed=1, classes=FEW)
    write_shape_videos(folder / "test", 4, seed=2, classes=FEW)
    return folder


def video(folder: Path, **changes: Any) -> Video:
    settings = Video(
        test=folder / "test",
        data=folder / "train",
        prompt=PROMPT,
        frames=FRAMES,
        temporal=TemporalConfig("mean"),
        crop=Crop((0.8, 1.0), flip=False),
        grayscale=0.0,
        fit=FitConfig(epochs=1, batch=6, precision="fp32", workers=0),
    )
    return replace(settings, **changes)


def clips(count: int = 12) -> tuple[Tensor, Tensor]:
    """Return frames uint8 (count, 4, 3, 32, 32) and class ids (count,)."""
    labels = torch.arange(count) % len(CLASSES)
    drawn = [shape_video(CLASSES[int(label)], "left", FRAMES, seed=i) for i, label in enumerate(labels)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3), labels


def method(view: View, temporal: TemporalConfig, trainable: bool = False) -> Text4Vis:
    config = Text4Vis.Config("", CLASSES, frames=FRAMES, temporal=temporal, trainable=trainable)
    made = Text4Vis(config, ImageTower(view), classifier(view, CLASSES, (PROMPT,)), view.logit_scale)
    made.init_weights(key(0, 0))
    return made.eval()


@torch.no_grad()
def zero_shot(view: View, frames: Tensor) -> Tensor:
    """Return the answers, from the view alone: un-normalised vectors averaged over frames, then cosines."""
    assert view.embed_image is not None
    joint = view.embed_image(view.encoder(view.encoder.normalize(frames.flatten(0, 1))))
    mean = F.normalize(joint.view(len(frames), FRAMES, -1).mean(dim=1), dim=-1)
    return (mean @ classifier(view, CLASSES, (PROMPT,)).T).argmax(dim=1)


def test_with_text_the_first_step_is_the_zero_shot_classifier(view: View) -> None:
    frames, labels = clips(60)
    made = method(view, TemporalConfig("mean"))
    with torch.no_grad():
        answers = made.classify(made.vectors(frames), made.matrix).argmax(dim=1)
    assert torch.equal(answers, zero_shot(view, frames))
    assert (answers == labels).float().mean() > 0.5, "and it is far above chance"


def test_the_untrained_results_are_the_zero_shot_accuracy(view: View, videos: Path, tmp_path: Path) -> None:
    found = video(videos, data=None)(view, tmp_path / "out")
    rows = [(name, path) for name in FEW for path in sorted((videos / "test" / name).iterdir())]
    frames = torch.stack([read_frames(path, range) for _, path in rows])
    vectors = classifier(view, FEW, (PROMPT,))
    assert view.embed_image is not None
    with torch.no_grad():
        joint = view.embed_image(view.encoder(view.encoder.normalize(frames.flatten(0, 1)))).view(len(rows), FRAMES, -1)
    scores = F.normalize(joint.mean(dim=1), dim=-1) @ vectors.T
    hits = [FEW[int(i)] == name for i, (name, _) in zip(scores.argmax(dim=1), rows, strict=True)]
    by = {result.metric: result for result in found}
    assert by["top1 untrained"].value == np.mean(hits) and by["top1 untrained"].n == len(rows)
    truth = np.array([[name == label for label in FEW] for name, _ in rows])
    chances = (view.logit_scale * scores.double()).softmax(dim=1).numpy()
    precision = average_precision_score(truth, chances, average="macro")
    assert by["map untrained"].value == pytest.approx(precision, abs=1e-6)
    assert not (tmp_path / "out").exists(), "nothing is trained"


def test_frames_may_be_in_any_order_for_the_mean_only(view: View) -> None:
    frames, _ = clips()
    mean, transformer = (method(view, TemporalConfig(kind)) for kind in ("mean", "transformer"))
    with torch.no_grad():
        torch.testing.assert_close(mean.vectors(frames.flip(1)), mean.vectors(frames), atol=1e-5, rtol=1e-5)
        change = transformer.vectors(frames.flip(1)) - transformer.vectors(frames)
    assert change.abs().max() > 1e-4


def test_a_transformer_that_adds_nothing_is_the_mean(view: View) -> None:
    """Its input passes twice, through the blocks and around them: the direction is that of the mean."""
    frames, _ = clips()
    mean, transformer = (method(view, TemporalConfig(kind)) for kind in ("mean", "transformer"))
    assert transformer.temporal is not None
    with torch.no_grad():
        transformer.temporal.positions.zero_()
        for block in transformer.temporal.blocks:
            for last in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
                last.weight.zero_(), last.bias.zero_()  # type: ignore[union-attr, operator]
        expected = mean.classify(mean.vectors(frames), mean.matrix)
        torch.testing.assert_close(transformer.classify(transformer.vectors(frames), mean.matrix), expected)


def test_temporal_transformer_by_hand() -> None:
    head = TemporalTransformer(8, 2, 1, 3)
    head.init_weights(key(0, 0))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    (block,) = head.blocks
    state = {name: p.double() for name, p in block.named_parameters()}

    def norm(y: Tensor, name: str) -> Tensor:
        centred = y - y.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    y = x.double() + head.positions.double()
    q, k, v = (norm(y, "norm1") @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).chunk(3, dim=-1)
    mixed = torch.zeros_like(y)
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(dim=-1)
        mixed[..., part] = weights @ v[..., part]
    y = y + mixed @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    hidden = norm(y, "norm2") @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    y = y + hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
    torch.testing.assert_close(head(x), (x.double() + y).float(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="mend --temporal"):
        TemporalTransformer(8, 3, 1, 3)


def test_both_sides_are_normalised(view: View) -> None:
    made = method(view, TemporalConfig("mean"))
    vectors = torch.randn(5, 64)
    with torch.no_grad():
        first = made.classify(vectors, made.matrix)
        torch.testing.assert_close(made.classify(7 * vectors, 3 * made.matrix), first)
    assert first.abs().max() <= view.logit_scale + 1e-4


def test_loss_is_the_sum_of_cross_entropies(view: View) -> None:
    frames, labels = clips()
    made = method(view, TemporalConfig("mean"))
    batch = Batch({"frames": frames, "label": labels}, torch.arange(12), torch.arange(12))
    with torch.no_grad():
        logits = made.classify(made.vectors(frames), made.matrix)
        expected = -logits.log_softmax(dim=1)[torch.arange(12), labels].sum()
        torch.testing.assert_close(made.embed(batch, key(0, 0)).local["classification"], expected)
    assert made.counts(batch)["classification"] == 12


def test_a_frozen_matrix_is_no_parameter_and_what_is_old_learns_slower(view: View) -> None:
    made = method(view, TemporalConfig("transformer"))
    names = dict(made.named_parameters())
    assert "matrix" not in names and "matrix" in dict(method(view, TemporalConfig("mean"), True).named_parameters())
    scales = {id(p): group["lr_scale"] for group in parameter_groups(made, Text4Vis.optim) for p in group["params"]}
    for name, parameter in names.items():
        if parameter.requires_grad:
            assert scales[id(parameter)] == (1.0 if name.startswith("temporal.") else 0.1), name
    assert not any(p.requires_grad for name, p in names.items() if ".text" in name), "the text tower never trains"
    with torch.no_grad():
        made.logit_scale.fill_(9.0)
    made.after_step(Progress(0, 1))
    assert made.report()["scale"] == pytest.approx(100.0)


def test_one_view_for_all_frames(view: View) -> None:
    frames, _ = clips(1)
    still = frames[0, :1].expand(4, -1, -1, -1)
    prepare = replace(video(Path()), grayscale=0.5, crop=Crop((0.3, 1.0)))
    made = replace(method(view, TemporalConfig("mean")).config, crop=prepare.crop, grayscale=prepare.grayscale)
    with_config = method(view, TemporalConfig("mean"))
    with_config.config = made
    grey = 0
    for i in range(20):
        example = with_config.prepare(Crop(), 32)(Document((), "", {"frames": still, "label": 3}), key(0, i))
        assert example is not None and example["frames"].shape == (4, 3, 32, 32) and example["label"] == 3
        assert all(torch.equal(frame, example["frames"][0]) for frame in example["frames"])
        grey += int((example["frames"][:, 0] == example["frames"][:, 2]).all())
    assert 3 <= grey <= 17
    assert with_config.prepare(Crop(), 32)(Document((), "", {"frames": still}), key(0, 0)) is None


def test_squares_of_the_test() -> None:
    frames = torch.arange(6, dtype=torch.uint8).expand(2, 3, 4, 6).contiguous()
    assert torch.equal(crops(frames, 4, 1)[0, 0, 0, 0], torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    starts = [int(square[0, 0, 0, 0]) for square in crops(frames, 4, 3)]
    assert starts == [0, 1, 2] and crops(frames.transpose(2, 3), 4, 3).shape == (3, 2, 3, 4, 4)
    assert crops(frames, 8, 1).shape == (1, 2, 3, 8, 8)


def test_random_matrices() -> None:
    q = orthogonal(5, 16, seed=0)
    torch.testing.assert_close(q @ q.T, torch.eye(5), atol=1e-6, rtol=0)
    assert not torch.equal(q, orthogonal(5, 16, seed=1)) and torch.equal(q, orthogonal(5, 16, seed=0))
    assert abs(float(normal(200, 64, 0).std()) - 1) < 0.02
    with pytest.raises(UserError, match="17 classes"):
        orthogonal(17, 16, 0)


def test_random_matrices_answer_at_chance(view: View) -> None:
    frames, labels = clips(200)
    made = method(view, TemporalConfig("mean"))
    with torch.no_grad():
        vectors = made.vectors(frames)
        for draw in (orthogonal, normal):
            hits = [
                (made.classify(vectors, draw(20, 64, seed)).argmax(1) == labels).float().mean() for seed in range(20)
            ]
            assert abs(float(torch.stack(hits).mean()) - 0.05) < 0.03


@pytest.mark.parametrize("classes", [2, 3])
def test_discriminants_separate_what_is_separable(classes: int) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % classes
    vectors = torch.randn(60, 10, generator=rng) + 6 * F.one_hot(labels, 10)
    rows = discriminants(vectors, labels, classes)
    assert rows.shape == (classes, 10)
    assert ((F.normalize(vectors, dim=1) @ F.normalize(rows, dim=1).T).argmax(dim=1) == labels).all()
    with pytest.raises(UserError, match="no video that decodes"):
        discriminants(vectors, labels, classes + 1)


def test_half_classes_by_hand(view: View) -> None:
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(size=(60, 5))), torch.from_numpy(rng.integers(0, 5, 60))
    facts = {"task": "t", "evaluator": "video", "note": "n", "extra": {}}
    found = half_classes(view, logits, labels, "", 0, facts)
    values = []
    for seed in range(10):
        np.random.seed(seed)
        chosen = list(np.random.permutation(5)[:2])
        rows = [i for i in range(60) if int(labels[i]) in chosen]
        values.append(np.mean([chosen[int(logits[i, chosen].argmax())] == int(labels[i]) for i in rows]))
    assert found.value == pytest.approx(np.mean(values)) and found.extra["std"] == pytest.approx(np.std(values))
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert found.chance == 0.5 and "+-" in found.note


def test_training_and_its_results(view: View, videos: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in view.encoder.state_dict().items()}
    results = video(videos)(view, tmp_path / "out")
    names = [r.metric for r in results]
    assert names[:4] == ["top1", "top5", "mean_class", "map"] and names[4:] == [
        f"{name} untrained" for name in names[:4]
    ]
    for result in results:
        assert result.n == 24 and result.low is not None and result.preprocess and result.data and result.feature_point
        assert result.extra["seed"] == 0
    assert all((tmp_path / "out" / name).exists() for name in ("run.json", "log.jsonl", "encoder.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in view.encoder.state_dict().items())
    again = video(videos)(view, tmp_path / "out")
    assert [r.value for r in again] == [r.value for r in results], "the same command again trains nothing"
    with pytest.raises(UserError, match="another run"):
        video(videos, trainable=True)(view, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "lda", "shots": 2},
        {"init": "orthogonal", "temporal": TemporalConfig("transformer", layers=1), "clips": 2, "crops": 3},
        {"init": "normal", "trainable": True, "dense": True},
    ],
    ids=str,
)
def test_other_settings_train_too(view: View, videos: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = video(videos, **changes)(view, tmp_path)
    assert len(results) == 8 and all(result.value is not None for result in results)


def test_zero_shot_on_other_classes(view: View, videos: Path, tmp_path: Path) -> None:
    write_shape_videos(tmp_path / "test", 2, seed=3, classes=CLASSES[8:13])
    results = video(videos, test=tmp_path / "test", protocol="zeroshot")(view, tmp_path / "out")
    by = {result.metric: result for result in results}
    assert {"top1", "top1 of half the classes", "top1 untrained", "top1 of half the classes untrained"} <= set(by)
    assert by["top1"].n == 10 and by["top1"].extra["classes"] == 5
    with pytest.raises(UserError, match="none of the classes"):
        video(videos, test=tmp_path / "test")(view, tmp_path / "closed")


def test_class_files_name_the_labels(view: View, videos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{i} | {name}\n" for i, name in enumerate(FEW)))
    for i, name in enumerate(FEW):
        shutil.copytree(videos / "test" / name, tmp_path / "test" / str(i))
    numbered = video(videos, data=None, test=tmp_path / "test", test_classes=names)(view, tmp_path)
    assert [r.value for r in numbered] == [r.value for r in video(videos, data=None)(view, tmp_path)]


def test_a_broken_video_is_skipped_in_training_and_named_in_the_test(view: View, videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos / "train", tmp_path / "train")
    shutil.copytree(videos / "test", tmp_path / "test")
    broken = tmp_path / "train" / FEW[0] / "broken.mp4"
    broken.write_bytes(b"no video")
    # One of 19 videos is more than the 5 % that a run puts up with: look at a longer run.
    write_shape_videos(tmp_path / "more", 4, seed=9, classes=FEW)
    for name in FEW:
        for path in (tmp_path / "more" / name).iterdir():
            shutil.move(path, tmp_path / "train" / name / f"more-{path.name}")
    settings = video(tmp_path, init="lda")
    assert settings(view, tmp_path / "out")[0].value is not None
    assert "broken.mp4" in (tmp_path / "out" / "bad_samples.txt").read_text()
    (tmp_path / "test" / FEW[0] / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken\.mp4") as error:
        video(tmp_path, data=None)(view, tmp_path / "again")
    assert "\n" not in str(error.value)


def test_when_no_video_decodes(view: View, videos: Path, tmp_path: Path) -> None:
    for name in FEW:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "train" / name / f"{i}.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the 12 videos decodes"):
        video(videos, data=tmp_path / "train", init="lda")(view, tmp_path / "lda")
    with pytest.raises(UserError, match="unusable"):
        video(videos, data=tmp_path / "train")(view, tmp_path / "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "missing"}, "does not exist"),
        ({"data": "empty"}, "no video"),
        ({"data": "one"}, "single class"),
        ({"data": "flat"}, "has no label"),
        ({"classes": "twice.txt"}, "twice"),
        ({"classes": "more.txt"}, "'green dog' has no folder"),
        ({"prompt": "a video"}, "needs one {}"),
        ({"frames": 0}, "--frames"),
        ({"shots": 4}, "fewer than --shots 4"),
        ({"data": None, "shots": 2}, "give --data"),
        ({"data": None, "init": "lda"}, "--init text"),
        ({"data": None, "classes": "twice.txt"}, "--test-classes"),
        ({"test_classes": Path("twice.txt")}, "--protocol zeroshot"),
        ({"protocol": "zeroshot", "trainable": True}, "--init text"),
    ],
)
def test_wrong_use_is_one_line(view: View, videos: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("one/cat", "flat"):
        (tmp_path / name).mkdir(parents=True)
        write_video(tmp_path / name / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    (tmp_path / "twice.txt").write_text(f"{FEW[0]}\n{FEW[0]}\n")
    (tmp_path / "more.txt").write_text("\n".join([*FEW, "green dog"]))
    given = {n: tmp_path / v if n in ("test", "data", "classes") and v is not None else v for n, v in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        video(videos, **given)(view, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_view_without_text_is_refused(view: View, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text tower"):
        video(videos)(replace(view, text=None), tmp_path / "out")


def test_command_line_shows_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["transfer", "video", "--help"])
    assert stop.value.code == 0 and {"--temporal.kind", "--shots"} <= set(capsys.readouterr().out.split())
