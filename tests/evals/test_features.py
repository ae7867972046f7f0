from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepare import read_pairs
from altsight.evals import features
from altsight.evals.base import Preprocess, Split, Task, View
from altsight.evals.features import captions_of, classes_of, extract, joint_vectors, labelled, labels_of
from altsight.nn.encoder import Encoder, EncoderConfig
from tests.evals.conftest import COLOURS, ColourEncoder, MakeSplit, Sample, coloured, make_view, near

T = TypeVar("T")


def on_ranks(size: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], T]) -> list[T]:
    """Run `work` on `size` ranks, each a thread with its own rank, whose gathers meet at a barrier."""
    place, barrier = threading.local(), threading.Barrier(size, timeout=30)
    slots: list[Any] = [None] * size

    def gather(value: Any) -> list[Any]:
        slots[place.rank] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()
        return values

    def run(rank: int) -> T:
        place.rank = rank
        return work()

    monkeypatch.setattr(features, "world", lambda: World(place.rank, size))
    monkeypatch.setattr(features, "gather_objects", gather)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def small_vit() -> Encoder:
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=8, patch_size=4, width=24, depth=2, heads=3))
    encoder.init_weights(key(0, 0, "init"))
    return encoder


def test_features_are_those_of_the_view_in_order(make_split: MakeSplit) -> None:
    split = make_split("test", [Sample((10 * i, 0, 0)) for i in range(11)])
    found = extract(make_view(), split)
    reds = torch.tensor([10 * i / 255 - 0.5 for i in range(11)])
    torch.testing.assert_close(found.vectors[:, 0], reds)
    assert found.kept == tuple(range(11)) and found.broken == 0


def test_a_view_extracts_once_and_the_next_view_decodes_nothing(
    make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, encoder = make_split("test", coloured(4)), ColourEncoder()
    view = make_view(encoder)
    first = extract(view, split)
    assert extract(view, split) is first
    assert encoder.encoded == 12

    def never(self: Preprocess, data: bytes) -> Tensor:
        raise AssertionError("decoded again")

    monkeypatch.setattr(Preprocess, "__call__", never)
    torch.testing.assert_close(extract(make_view(), split).vectors, first.vectors)


def test_large_splits_are_not_held_in_memory(make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    split = make_split("test", coloured(4))
    monkeypatch.setattr(features, "MAX_CACHED_BYTES", 12 * 3 * 8 * 8 - 1)
    extract(make_view(), split)
    assert not split.cache


def test_two_splits_of_the_same_name_are_kept_apart(tmp_path: Path, make_split: MakeSplit) -> None:
    view = make_view()
    one = extract(view, make_split("test", coloured(2, names=["red"])))
    other = extract(view, make_split("test", coloured(2, names=["blue"])))
    assert not torch.equal(one.vectors, other.vectors)


def test_broken_images_and_missing_labels_are_left_out_and_counted(make_split: MakeSplit) -> None:
    samples = [
        Sample(None, "red"),
        Sample(COLOURS["red"], "red"),
        Sample(COLOURS["blue"]),
        Sample(None, "red"),
        Sample(COLOURS["green"], "green"),
    ]
    split = make_split("test", samples)
    view, task = make_view(batch_size=2), Task("t", split, split, split, label="kind")
    found = labelled(view, task, split)
    assert extract(view, split).kept == (1, 2, 4)
    assert found.rows == (0, 2)
    assert [classes_of(task)[i] for i in found.labels.tolist()] == ["red", "green"]
    assert found.note == "test: left out 2 with a broken image and 1 with no label"


def test_classes_are_the_union_over_the_splits(make_split: MakeSplit) -> None:
    splits = [
        make_split(name, [Sample(COLOURS[c], c)]) for name, c in (("train", "red"), ("val", "blue"), ("test", "grey"))
    ]
    assert classes_of(Task("t", *splits, label="kind")) == ("blue", "grey", "red")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_work_and_agree_to_the_last_bit(
    size: int, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = coloured(5)
    samples[4] = Sample(None, "red")
    encoder = small_vit()

    source = make_split("test", samples).source

    def work() -> tuple[Tensor, tuple[int, ...], str, list[list[str]]]:
        view, split = View("vit", encoder, Preprocess(8), batch_size=4), Split("test", source)
        found = labelled(view, Task("t", split, split, split, label="kind"), split)
        return found.vectors, extract(view, split).kept, found.data, captions_of(split)

    alone = work()
    for vectors, kept, data, captions in on_ranks(size, monkeypatch, work):
        assert torch.equal(vectors, alone[0])
        assert (kept, data, captions) == alone[1:]


def test_each_rank_encodes_only_its_part(make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_split("test", coloured(8)).source

    def work() -> int:
        encoder = ColourEncoder()
        assert len(extract(make_view(encoder), Split("test", source)).vectors) == 24
        return encoder.encoded

    assert on_ranks(2, monkeypatch, work) == [12, 12]


def test_the_data_hash_knows_images_and_labels_but_no_paths(make_split: MakeSplit, tmp_path: Path) -> None:
    def data(name: str, samples: list[Sample]) -> str:
        split = make_split(name, samples)
        return labelled(make_view(), Task("t", split, split, split, label="kind"), split).data

    samples = coloured(2)
    first = data("one", samples)
    assert data("two", samples) == first
    assert data("three", [*samples[:-1], Sample(near("blue", 9), "blue")]) != first
    assert data("four", [*samples[:-1], Sample(samples[-1].colour, "red")]) != first
    assert data("five", samples[::-1]) != first


def test_joint_vectors_are_those_of_encode_image(make_split: MakeSplit) -> None:
    split = make_split("test", coloured(3))
    torch.manual_seed(0)
    view = make_view(dual=True, embed_image=torch.nn.Linear(3, 5))
    pixels = torch.stack([view.preprocess(split.source.image(i)) for i in range(9)])
    torch.testing.assert_close(joint_vectors(view, split), view.encode_image(pixels))
    torch.testing.assert_close(joint_vectors(view, split).norm(dim=1), torch.ones(9))


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    import io
    import tarfile

    path = tmp_path / "numbers.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", b"x"), ("a.json", b'{"kind": 7}'), ("b.png", b"x"), ("b.json", b"{broken")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert labels_of(Split("test", read_pairs(str(path))), "kind") == ["7", ""]


def test_what_cannot_be_evaluated_is_said_plainly(make_split: MakeSplit) -> None:
    broken, good = make_split("broken", [Sample(None, "a")] * 3), make_split("good", coloured(1))
    with pytest.raises(UserError, match="none of the 3 images of the split 'broken'"):
        extract(make_view(), broken)
    with pytest.raises(UserError, match="no sample of the task 't' has a JSON field 'colour'"):
        classes_of(Task("t", good, good, good, label="colour"))
    unlabelled = make_split("unlabelled", [Sample(COLOURS["red"])])
    with pytest.raises(UserError, match="'unlabelled' of the task 't' has no image with a 'kind'"):
        labelled(make_view(), Task("t", good, good, unlabelled, label="kind"), unlabelled)


def test_features_that_are_not_finite_are_refused(make_split: MakeSplit) -> None:
    encoder = ColourEncoder()
    torch.nn.init.constant_(encoder.gain, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        extract(make_view(encoder), make_split("test", coloured(1)))
