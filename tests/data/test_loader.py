"""What a batch holds depends on its positions alone: not on ranks, workers, restarts or broken neighbours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Batch, Document, Example
from altsight.data.captions import Captions
from altsight.data.loader import Loader, check_batch
from altsight.data.order import Order
from altsight.data.prepare import read_pairs
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.sources import Pairs
from altsight.data.views import Crop, random_keep
from tests.data.conftest import WriteShards

SIZE, BATCH, SAMPLES = 22, 8, 48


@dataclass(frozen=True)
class CropMaskText:
    """Draws on every kind of keyed randomness; a sample without text is of no use to it."""

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.texts:
            return None
        letters = document.texts[0].encode()[-8:].ljust(8)
        return {
            "images": Crop()(document.images[0], 8, at.child("view")),
            "keep": random_keep(16, 0.75, at),
            "letters": torch.tensor(list(letters)),
        }


def pairs(folder: Path) -> Pairs:
    return read_pairs(str(folder), ("{txt}", "{title}"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Pairs:
    return pairs(write_shards(tmp_path_factory.mktemp("data") / "whole", SIZE, 7))


def loader(source: Pairs, workers: int = 0, batch: int = BATCH) -> Loader:
    return Loader(source, Order(len(source), 3), CropMaskText(), batch, workers)


def run(source: Pairs, world: int = 1, workers: int = 0, start: int = 0, samples: int = SAMPLES) -> list[Batch]:
    """Return the global batches, put together from all ranks."""
    ranks = [
        [batch for batch, _ in loader(source, workers).batches(World(rank, world), start, samples)]
        for rank in range(world)
    ]
    return [join(list(parts)) for parts in zip(*ranks, strict=True)]


def join(parts: list[Batch]) -> Batch:
    """Put the parts of all ranks together; rank r of R has every R-th position."""
    size = len(parts)
    assert all(torch.equal(p.positions, p.positions[0] + size * torch.arange(len(p))) for p in parts)
    order = torch.cat([part.positions for part in parts]).argsort()
    tensors = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0].tensors}
    positions = torch.cat([part.positions for part in parts])[order]
    samples = torch.cat([part.samples for part in parts])[order]
    return Batch(tensors, positions, samples, tuple(sorted(sum((part.bad for part in parts), ()))))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.positions, y.positions)
        assert torch.equal(x.samples, y.samples)
        assert x.bad == y.bad
        assert x.tensors.keys() == y.tensors.keys()
        assert all(torch.equal(x[name], y[name]) for name in x.tensors)


@pytest.fixture(scope="module")
def reference(source: Pairs) -> list[Batch]:
    return run(source)


def test_batches_follow_the_order(reference: list[Batch]) -> None:
    assert [len(batch) for batch in reference] == [BATCH] * (SAMPLES // BATCH)
    positions = torch.cat([batch.positions for batch in reference])
    samples = torch.cat([batch.samples for batch in reference])
    assert positions.tolist() == list(range(SAMPLES))
    assert samples.tolist() == [Order(SIZE, 3).sample(p) for p in range(SAMPLES)]
    assert reference[0]["images"].shape == (BATCH, 3, 8, 8)
    assert reference[0]["images"].dtype == torch.uint8
    assert all(batch.bad == () for batch in reference)


def test_a_sample_looks_different_when_it_comes_again(reference: list[Batch]) -> None:
    samples = torch.cat([batch.samples for batch in reference])
    images = torch.cat([batch["images"] for batch in reference])
    first, again = (samples == samples[0]).nonzero().flatten()[:2].tolist()
    assert not torch.equal(images[first], images[again])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_world_size_changes_nothing(source: Pairs, reference: list[Batch], world: int) -> None:
    assert_same(run(source, world), reference)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_workers_change_nothing(source: Pairs, reference: list[Batch], workers: int) -> None:
    assert_same(run(source, workers=workers), reference)


def test_ranks_with_workers_change_nothing(source: Pairs, reference: list[Batch]) -> None:
    assert_same(run(source, world=2, workers=2), reference)


@pytest.mark.parametrize("start", [8, 24, 40])
def test_a_restart_goes_on_where_it_was(source: Pairs, reference: list[Batch], start: int) -> None:
    assert_same(run(source, start=start), reference[start // BATCH :])
    assert_same(run(source, world=4, start=start), reference[start // BATCH :])


def test_a_restart_far_from_the_beginning(source: Pairs) -> None:
    start = 10**12
    assert_same(run(source, 2, 1, start, start + 16), run(source, 1, 0, start, start + 16))


@pytest.mark.parametrize(("samples", "steps"), [(47, 5), (48, 6), (55, 6), (7, 0), (8, 1)])
def test_only_whole_steps(source: Pairs, samples: int, steps: int) -> None:
    assert len(run(source, samples=samples)) == steps


def test_the_wait_is_measured(source: Pairs) -> None:
    waits = [wait for _, wait in loader(source).batches(World(), 0, SAMPLES)]
    assert len(waits) == SAMPLES // BATCH
    assert all(0 < wait < 10 for wait in waits)


def test_torchs_global_random_state_is_left_alone(source: Pairs) -> None:
    before = torch.get_rng_state()
    run(source, workers=1, samples=BATCH)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Pairs:
    html = b"<html>404 not found</html>"
    return pairs(write_shards(tmp_path_factory.mktemp("data") / "damaged", SIZE, 7, {5: html, 16: html}))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_named_and_nothing_else_moves(
    damaged: Pairs, reference: list[Batch], workers: int
) -> None:
    batches = run(damaged, workers=workers)
    replaced = 0
    for batch, whole in zip(batches, reference, strict=True):
        hit = (whole.samples == 5) | (whole.samples == 16)
        replaced += int(hit.sum())
        assert torch.equal(batch.positions, whole.positions)
        assert torch.equal(batch.samples[~hit], whole.samples[~hit])
        assert not set(batch.samples.tolist()) & {5, 16}
        for name in whole.tensors:
            assert torch.equal(batch[name][~hit], whole[name][~hit])
        names = {damaged.index.name(5), damaged.index.name(16)}
        assert len(batch.bad) >= int(hit.sum())
        assert {bad.split(" (broken image: ")[0] for bad in batch.bad} <= names
    assert replaced >= 4
    assert_same(batches, run(damaged, world=2))


def test_a_replacement_is_prepared_with_the_key_of_its_position(damaged: Pairs) -> None:
    order = Order(SIZE, 3)
    position = next(p for p in range(SAMPLES) if order.sample(p) == 5)
    batch = run(damaged)[position // BATCH]
    row = position % BATCH
    sample = int(batch.samples[row])
    assert sample in [order.sample(position, attempt) for attempt in (1, 2, 3)]
    at = Key(3, position)
    expected = CropMaskText()(damaged.document(sample, at), at)
    assert expected is not None
    assert all(torch.equal(batch[name][row], expected[name]) for name in expected)


def test_samples_that_the_method_cannot_use_are_replaced(source: Pairs) -> None:
    titled = Pairs(source.index, Captions(("{gone}",)))
    with pytest.raises(UserError, match=r"100 samples in a row are unusable.*nothing in it that this method can use"):
        run(titled)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_image_end_the_run(tmp_path: Path, write_shards: WriteShards, workers: int) -> None:
    broken = pairs(write_shards(tmp_path / "broken", 4, 4, {i: b"no image" for i in range(4)}))
    with pytest.raises(UserError, match=r"100 samples in a row are unusable, .*00000\.tar#.*altsight check") as caught:
        list(loader(broken, workers, batch=4).batches(World(), 0, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_named(tmp_path: Path, write_shards: WriteShards, workers: int) -> None:
    folder = write_shards(tmp_path / "vanishing", 8, 2)
    source = pairs(folder)
    (folder / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002\.tar' cannot be read"):
        list(loader(source, workers).batches(World(), 0, 8))


def test_a_batch_that_the_ranks_cannot_share(source: Pairs) -> None:
    with pytest.raises(UserError, match="batch of 8 cannot be split over 3 ranks"):
        next(iter(loader(source).batches(World(0, 3), 0, 8)))


def test_fewer_workers_than_none(source: Pairs) -> None:
    with pytest.raises(UserError, match="-1 processes cannot decode"):
        next(iter(loader(source, workers=-1).batches(World(), 0, 8)))


def test_the_first_batch_comes_within_two_seconds(sample_data: Prepared) -> None:
    """From a prepared folder, in processes that have to be started first; the best of three on a busy machine."""

    def first() -> float:
        start = time.perf_counter()
        found = open_prepared(sample_data.directory).source
        prepare = CropMaskText()
        next(iter(Loader(found, found.order(0), prepare, 64, workers=2).batches(World(), 0, 640)))
        return time.perf_counter() - start

    assert min(first() for _ in range(3)) < 2


@pytest.mark.parametrize(
    ("batch", "size", "words"), [(11, 10, "at most 10"), (0, 10, "1 or more"), (1, 0, "prepare more")]
)
def test_check_batch_refuses(batch: int, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_batch(batch, size, "data")


def test_check_batch_accepts() -> None:
    check_batch(10, 10, "data")
