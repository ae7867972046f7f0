"""Features on disk: found again by a later command, and by nothing that differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals import evaluate
from altsight.evals.base import Preprocess, Split, Task, View
from altsight.evals.features import Extracted, extract
from altsight.nn.encoder import Encoded, Encoder, EncoderConfig
from tests.evals.conftest import MakeSplit, Sample, coloured, near
from tests.evals.test_features import on_ranks

CONFIG = EncoderConfig("vit_tiny_patch16_224", img_size=8, patch_size=4, width=24, depth=2, heads=3)


class Projection(nn.Module):
    """Stands for a dual encoder: the mean patch, projected."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(24, 5)

    def embed(self, encoded: Encoded) -> Tensor:
        projected: Tensor = self.linear(encoded.patches.mean(dim=1))
        return projected


class Counted:
    """Builds views as every command does, and counts the images that their encoders see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.encoded = folder, 0

    def view(self, seed: int = 0, config: EncoderConfig = CONFIG, joint: int | None = None) -> View:
        encoder = Encoder(config)
        encoder.init_weights(key(seed, 0, "init"))
        encoder.register_forward_hook(lambda module, images, out: self._count(len(images[0])))
        embed = None if joint is None else Projection(joint).embed
        return View("vit", encoder, Preprocess(8), batch_size=4, embed_image=embed, store=self.folder)

    def _count(self, images: int) -> None:
        self.encoded += images


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "features")


def same(a: Extracted, b: Extracted) -> bool:
    joint = a.joint is b.joint or (a.joint is not None and b.joint is not None and torch.equal(a.joint, b.joint))
    return joint and torch.equal(a.vectors, b.vectors) and (a.kept, a.digests) == (b.kept, b.digests)


@pytest.mark.parametrize("joint", [None, 0])
def test_a_second_command_encodes_nothing(counted: Counted, make_split: MakeSplit, joint: int | None) -> None:
    samples = coloured(3)
    samples[4] = Sample(None, "red")
    source = make_split("test", samples).source
    first = extract(counted.view(joint=joint), Split("test", source))
    assert counted.encoded == 8
    again = extract(counted.view(joint=joint), Split("test", source))
    assert counted.encoded == 8 and same(first, again)
    assert again.broken == 1 and (again.joint is None) == (joint is None)


def test_all_probes_of_all_commands_share_the_features(counted: Counted, colours: Task) -> None:
    first = evaluate(counted.view(), [colours], ["knn", "linear"])
    assert counted.encoded == 3 * 24
    again = evaluate(counted.view(), [dataclasses.replace(colours, name="again")], ["linear", "knn", "collapse"])
    assert {(r.metric, r.evaluator): r.value for r in first}.items() <= {
        (r.metric, r.evaluator): r.value for r in again
    }.items()
    # Collapse looks at mirror images, which nobody keeps.
    assert counted.encoded == 3 * 24 + 24


def test_what_differs_is_encoded_anew(counted: Counted, make_split: MakeSplit) -> None:
    samples = coloured(2)
    split = make_split("test", samples)
    view = counted.view(joint=0)
    changes = [
        view,
        counted.view(seed=1, joint=0),
        counted.view(joint=1),
        counted.view(),
        counted.view(config=dataclasses.replace(CONFIG, quick_gelu=True), joint=0),
        counted.view(config=dataclasses.replace(CONFIG, normalization="half"), joint=0),
        dataclasses.replace(view, preprocess=Preprocess(8, crop_ratio=0.5), cache={}),
        dataclasses.replace(view, feature_point="cls", cache={}),
    ]
    for number, changed in enumerate(changes, start=1):
        extract(changed, split)
        assert counted.encoded == 6 * number
    other = [*samples[:-1], Sample(near("grey", 9), "blue")]
    for name, content in (("changed", other), ("turned", samples[::-1]), ("shorter", samples[1:])):
        before = counted.encoded
        extract(counted.view(joint=0), make_split(name, content))
        assert counted.encoded == before + len(content), name


def test_labels_may_change_and_the_features_stay(counted: Counted, make_split: MakeSplit) -> None:
    samples = coloured(2)
    extract(counted.view(), make_split("test", samples))
    relabelled = [dataclasses.replace(sample, label="other") for sample in samples]
    extract(counted.view(), dataclasses.replace(make_split("relabelled", relabelled), name="test"))
    assert counted.encoded == 6


def test_a_damaged_file_is_made_anew(counted: Counted, make_split: MakeSplit) -> None:
    split = make_split("test", coloured(2))
    first = extract(counted.view(), split)
    (path,) = counted.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert same(extract(counted.view(), split), first)
    assert counted.encoded == 12 and path.read_bytes() == whole
    assert list(counted.folder.iterdir()) == [path]


def test_nothing_is_left_of_a_write_that_fails(
    counted: Counted, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("altsight.evals.store.save_file", full)
    with pytest.raises(UserError, match=r"cannot be kept in .*No space left"):
        extract(counted.view(), make_split("test", coloured(1)))
    assert not list(counted.folder.iterdir())


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_one_file_and_read_it_together(
    size: int, counted: Counted, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, view = make_split("test", coloured(5)).source, counted.view()
    alone = extract(dataclasses.replace(view, store=None, cache={}), Split("test", source))

    def work() -> Extracted:
        return extract(dataclasses.replace(view, cache={}), Split("test", source))

    for encoded in (30, 30):
        assert all(same(one, alone) for one in on_ranks(size, monkeypatch, work))
        assert counted.encoded == encoded
    assert len(list(counted.folder.iterdir())) == 1


def test_a_projection_without_weights_is_refused(counted: Counted, make_split: MakeSplit) -> None:
    view = dataclasses.replace(counted.view(), embed_image=lambda encoded: encoded.patches.mean(dim=1))
    with pytest.raises(UserError, match="its projection is no module"):
        extract(view, make_split("test", coloured(1)))
