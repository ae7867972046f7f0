"""The order: every pass a fresh permutation, any position in O(1), and nothing remembered."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from altsight.data.order import CYCLE, LANES, MixedOrder, Order


def one_pass(order: Order, number: int = 0) -> list[int]:
    return order.samples(np.arange(number * order.size, (number + 1) * order.size)).tolist()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    number=st.integers(0, 10**9),
    block=st.integers(1, 9),
    blocks=st.integers(1, 9),
)
@example(size=1, seed=0, number=0, block=4, blocks=2)
@example(size=3, seed=0, number=0, block=4, blocks=2)
@example(size=4, seed=0, number=0, block=4, blocks=2)
@example(size=5, seed=0, number=0, block=4, blocks=2)
@example(size=8, seed=0, number=0, block=4, blocks=2)
@example(size=9, seed=0, number=0, block=4, blocks=2)
@example(size=17, seed=0, number=0, block=4, blocks=2)
def test_every_pass_is_a_permutation(size: int, seed: int, number: int, block: int, blocks: int) -> None:
    order = Order(size, seed, block, block * blocks)
    assert sorted(one_pass(order, number)) == list(range(size))


@pytest.mark.parametrize("size", [255, 256, 257, 65535, 65536, 65537, 65536 + 300, 200_000])
def test_permutation_at_the_edges_of_block_and_window(size: int) -> None:
    assert len(np.unique(Order(size, 1).samples(np.arange(size)))) == size


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 99), positions=st.lists(st.integers(0, 10**12), min_size=1))
def test_a_position_alone_gives_what_it_gives_among_others(size: int, seed: int, positions: list[int]) -> None:
    together = Order(size, seed, 8, 32).samples(np.array(positions)).tolist()
    assert together == [Order(size, seed, 8, 32).sample(p) for p in positions]


def test_passes_and_seeds_differ() -> None:
    orders = [one_pass(Order(100, seed), number) for seed in range(3) for number in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two independent permutations agree in one place on average; Poisson(1) puts 1e-7 above 9.
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10


def test_every_sample_is_equally_likely_at_every_place() -> None:
    # A ragged tail (40 = 5 blocks of 7 and 5 left over) must not favour anything.
    size, runs = 40, 1200
    order = Order(size, 3, block=7, window=14)
    at = {place: order.samples(place + size * np.arange(runs)) for place in (0, 13, 14, 39)}
    for samples in at.values():
        counts = np.bincount(samples, minlength=size)
        assert ((counts - runs / size) ** 2 / (runs / size)).sum() < 86  # chi-square, 39 degrees of freedom, p = 2e-5


@pytest.mark.parametrize("size", [16, 40])
def test_two_places_know_nothing_of_each_other(size: int) -> None:
    runs = 600
    order = Order(size, 1)
    first = order.samples(size * np.arange(runs))
    for place in (1, 5, size - 1):
        steps = (order.samples(place + size * np.arange(runs)) - first) % size
        counts = np.bincount(steps, minlength=size)[1:]
        expected = runs / (size - 1)
        degrees = size - 2
        # The normal approximation of chi-square, five standard deviations.
        assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_every_window_is_mixed_in_its_own_way() -> None:
    windows = np.array(one_pass(Order(1000, 0, block=50, window=50))).reshape(20, 50)
    assert len({tuple(np.argsort(window).tolist()) for window in windows}) == 20


def test_a_data_set_within_one_window_is_shuffled_without_trace_of_its_blocks() -> None:
    samples = np.array(one_pass(Order(4096, 0)))
    near = np.abs(np.diff(samples)) <= 2
    # Among 4,095 pairs of a uniform shuffle about 4 are that close.
    assert near.sum() < 20
    assert abs(np.corrcoef(np.arange(4096), samples)[0, 1]) < 0.07


def test_a_window_reads_few_places() -> None:
    order = Order(1_000_000, 0, block=100, window=1000)
    samples = np.sort(order.samples(np.arange(5000, 6000)))
    runs = 1 + (np.diff(samples) > 1).sum()
    # Ten blocks; the rotation may cut one of them at the end of the data set.
    assert runs <= 11


def test_replacements_are_pure_differ_by_attempt_and_shift_nothing() -> None:
    order = Order(1000, 5)
    before = one_pass(order)
    drawn = [[order.sample(p, attempt) for attempt in range(1, 6)] for p in range(200)]
    assert drawn == [[order.sample(p, attempt) for attempt in range(1, 6)] for p in range(200)]
    assert one_pass(order) == before
    flat = np.array(drawn).ravel()
    assert flat.min() >= 0
    assert flat.max() < 1000
    # 1,000 draws out of 1,000 samples hit 632 different ones on average, with a standard deviation of 10.
    assert 580 < len(np.unique(flat)) < 690
    assert Order(1, 0).sample(7, attempt=3) == 0


def test_nothing_of_the_size_of_the_data_set_is_held() -> None:
    order = Order(10**13, 0)
    tracemalloc.start()
    samples = order.samples(np.array([0, 10**13 - 1, 10**15]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert ((samples >= 0) & (samples < 10**13)).all()


def blocks_of(samples: np.ndarray, block: int) -> set[int]:
    return set((samples // block).tolist())


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
@pytest.mark.parametrize("start", [0, 3_000_001])
def test_ranks_read_no_block_twice_within_a_window(ranks: int, start: int) -> None:
    order = Order(1_000_000, 7, block=16, window=16 * 64 * 4)
    start -= (start % order.size) % order.window  # where a window begins
    positions = np.arange(start, start + order.window)
    read = [blocks_of(order.samples(positions[positions % ranks == r]), 16) for r in range(ranks)]
    assert sum(map(len, read)) == len(set().union(*read)) == order.window // 16


def test_small_windows_have_fewer_lanes() -> None:
    assert Order(10**6, 0).lanes == 64
    assert Order(10**6, 0, block=7, window=7 * 6).lanes == 2
    assert Order(10**6, 0, block=7, window=7).lanes == 1


def test_neighbours_are_as_far_apart_as_after_a_full_shuffle_of_the_window() -> None:
    order = Order(65_536 * 3, 1)
    samples = order.samples(np.arange(65_536))
    place = np.empty(order.size, np.int64)
    place[:] = -1
    place[samples] = np.arange(65_536)
    both = (place[:-1] >= 0) & (place[1:] >= 0)
    distance = np.abs(place[1:] - place[:-1])[both]
    # Two uniform places in a window are a third of it apart on average.
    assert 0.30 * 65_536 < distance.mean() < 0.36 * 65_536
    # In a batch of 256 they meet with a chance of about 1 / 256.
    met = (place[1:] // 256 == place[:-1] // 256)[both].mean()
    assert met < 1.5 / 256


ORDERS = (Order(1000, 3, stream=0), Order(77, 3, stream=1), Order(5, 3, stream=2))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (1000, 1, 1), (5, 3, 10_000)])
def test_a_mixture_meets_its_weights_and_walks_every_source_in_its_own_order(weights: tuple[float, ...]) -> None:
    mixed = MixedOrder(ORDERS, weights)
    assert sum(mixed.counts) == CYCLE
    assert min(mixed.counts) >= 1
    positions = np.arange(LANES * CYCLE * 2)
    samples = mixed.samples(positions)
    starts = np.cumsum([0, *(order.size for order in ORDERS)])
    source = np.searchsorted(starts, samples, side="right") - 1
    for k, order in enumerate(ORDERS):
        mine = samples[source == k] - starts[k]
        assert len(mine) == 2 * LANES * mixed.counts[k]
        # What a source gives over whole cycles is a beginning of its own order, each position once.
        expected = order.samples(np.arange(len(mine)))
        assert np.array_equal(np.sort(mine), np.sort(expected))
        exact = weights[k] / sum(weights) * CYCLE
        # Rounding moves a count by less than 1, and what the least sources are given by their number.
        assert abs(mixed.counts[k] - exact) < 1 or (mixed.counts[k] == 1 or min(mixed.counts) == 1)
        assert abs(mixed.counts[k] - exact) < len(ORDERS)


def test_a_mixture_mixes_within_every_stretch() -> None:
    mixed = MixedOrder(ORDERS, (1, 1, 2))
    source = np.searchsorted([1000, 1077], mixed.samples(np.arange(100 * 256)), side="right").reshape(100, 256)
    share = (source == 2).mean(1)
    assert abs(share.mean() - 0.5) < 0.02
    assert share.min() > 0.35 and share.max() < 0.65  # 256 fair draws: five standard deviations are 0.16


def test_a_position_of_a_mixture_alone_gives_what_it_gives_among_others() -> None:
    mixed = MixedOrder(ORDERS, (1, 2, 3))
    positions = np.array([0, 1, 63, 64, 65_535, 65_536, 10**9, 10**12 + 7])
    assert mixed.samples(positions).tolist() == [mixed.sample(int(p)) for p in positions]
    assert mixed.samples(np.array([], dtype=np.int64)).tolist() == []


def test_a_replacement_in_a_mixture_comes_from_the_same_source() -> None:
    mixed = MixedOrder(ORDERS, (1, 1, 1))
    for position in range(300):
        first = np.searchsorted([1000, 1077], mixed.sample(position), side="right")
        for attempt in (1, 2, 3):
            again = mixed.sample(position, attempt)
            assert np.searchsorted([1000, 1077], again, side="right") == first
