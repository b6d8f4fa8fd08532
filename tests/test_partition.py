"""Partitions of units over bins, against brute force over every assignment of small cases."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewbits.partition import balance, balance_low_first, fill, pack

QUICK = settings(max_examples=200, deadline=None)  # an example may take long on a busy machine
SMALL = st.integers(0, 9)
UNITS = st.lists(SMALL, max_size=7)
BINS = st.lists(st.integers(-2, 25), max_size=3)


def _loads(sizes: list[int], bins: tuple[int, ...] | list[int], count: int) -> list[int]:
    loads = [0] * count
    for size, index in zip(sizes, bins, strict=True):
        loads[index] += size
    return loads


def _fits(sizes: list[int], bins: tuple[int, ...] | list[int], capacities: list[int]) -> bool:
    """Whether every unit has a bin that there is, and no bin holds more than it can."""
    return (
        len(bins) == len(sizes)
        and all(0 <= b < len(capacities) for b in bins)
        and all(
            load <= max(room, 0) for load, room in zip(_loads(sizes, bins, len(capacities)), capacities, strict=True)
        )
    )


def _contiguous(sizes: list[int], capacities: list[int]) -> list[tuple[int, ...]]:
    every = itertools.combinations_with_replacement(range(len(capacities)), len(sizes))
    return [bins for bins in every if _fits(sizes, bins, capacities)]


def _order_kept(bins: list[int]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(bins))


def _cost(sizes: list[int], bins: tuple[int, ...] | list[int], count: int) -> tuple[int, int, list[int]]:
    """What `balance` minimises; the last entry decides ties: fewest units in the last bin, then in that before it."""
    loads = _loads(sizes, bins, count)
    return max(loads, default=0), sum(load**2 for load in loads), [list(bins).count(b) for b in reversed(range(count))]


@QUICK
@given(UNITS, BINS)
def test_fill_is_feasible_if_anything_is_and_takes_the_longest_prefix(sizes, capacities):
    bins, possible = fill(sizes, capacities), _contiguous(sizes, capacities)
    assert (bins is not None) == bool(possible)
    if bins is None:
        return
    assert _fits(sizes, bins, capacities)
    assert _order_kept(bins)
    for b in range(len(capacities)):
        assert sum(i <= b for i in bins) == max(sum(i <= b for i in other) for other in possible)


@QUICK
@given(UNITS, BINS)
@example([3, 9, 6, 2, 3], [25] * 3)  # 12, 6, 5 has fewer squares than 3, 9, 11, but a larger maximum
def test_balance_is_the_best_of_all_contiguous_partitions(sizes, capacities):
    bins, possible = balance(sizes, capacities), _contiguous(sizes, capacities)
    best = min(possible, key=lambda other: _cost(sizes, other, len(capacities)), default=None)
    assert (bins if bins is None else tuple(bins)) == best


@QUICK
@given(UNITS, BINS)
def test_low_first_leaves_bin_0_the_least(sizes, capacities):
    bins, possible = balance_low_first(sizes, capacities), _contiguous(sizes, capacities)
    assert (bins is not None) == bool(possible)
    if bins is None:
        return
    assert _fits(sizes, bins, capacities)
    assert _order_kept(bins)
    if len(capacities) < 2:
        assert bins == fill(sizes, capacities)
        return
    first = bins.count(0)
    assert first == min(other.count(0) for other in possible)
    assert sum(sizes[:first]) == min(_loads(sizes, other, len(capacities))[0] for other in possible)
    assert [b - 1 for b in bins[first:]] == balance(sizes[first:], capacities[1:])


@QUICK
@given(UNITS, BINS)
def test_pack_finds_a_partition_wherever_there_is_one(sizes, capacities):
    bins = pack(sizes, capacities)
    every = itertools.product(range(len(capacities)), repeat=len(sizes))
    assert (bins is not None) == any(_fits(sizes, other, capacities) for other in every)
    assert bins is None or _fits(sizes, bins, capacities)


@QUICK
@given(st.lists(st.integers(1, 9), min_size=1, max_size=10), st.integers(1, 4), st.randoms(use_true_random=False))
def test_pack_finds_a_partition_without_a_byte_to_spare(sizes, count, rng):
    """Capacities made from a partition are feasible, and the hardest for a heuristic."""
    capacities = _loads(sizes, [rng.randrange(count) for _ in sizes], count)
    bins = pack(sizes, capacities)
    assert bins is not None
    assert _loads(sizes, bins, count) == capacities


def test_pack_searches_where_first_fit_decreasing_fails():
    assert _fits([4, 3, 3, 2, 2, 2], pack([4, 3, 3, 2, 2, 2], [8, 8]) or [], [8, 8])  # 4+2+2 and 3+3+2
    assert pack([6, 1, 6], [12, 1]) == [0, 1, 0]
    assert fill([6, 1, 6], [12, 1]) is None
    assert pack([5, 5, 5], [8, 8]) is None  # the total would fit


def test_pack_prefers_earlier_bins_and_fills_them_to_the_last_byte():
    assert pack([1] * 20, [10, 10]) == [0] * 10 + [1] * 10  # too many units for the exact search
    assert pack([1, 2], [3, 3]) == [0, 0]


@QUICK
@given(st.integers(1, 10**12), st.integers(0, 60), st.integers(1, 8))
def test_equal_blocks_are_spread_evenly(size, number, count):
    capacities = [size * number] * count
    bins = balance([size] * number, capacities)
    assert bins is not None
    loads = _loads([size] * number, bins, count)
    assert max(loads) - min(loads) <= size
    assert loads == sorted(loads, reverse=True)


def test_sums_are_exact_beyond_the_precision_of_floats():
    assert fill([2**60, 1], [2**60]) is None
    assert balance([2**60, 1, 2**60], [2**60 + 1] * 2) == [0, 0, 1]
    assert balance([2**60, 1, 2**60], [2**60, 2**60 + 1]) == [0, 1, 1]


@pytest.mark.parametrize(
    "sizes",
    [
        [2**30] * 400,
        [random.Random(0).randrange(2**32) for _ in range(400)],
        [2**44, *range(399)],  # one unit sets the largest load, so that a bin may hold all the others
        [2**40 * 19**i // 20**i for i in range(400)],
        [0] * 400,
    ],
    ids=["equal", "random", "one large", "decreasing", "empty"],
)
def test_balance_takes_little_time(sizes):
    """A tenth of a second is what it may take; the factor of five is for a busy machine."""
    start = time.process_time()
    assert balance(sizes, [sum(sizes)] * 8) is not None
    assert time.process_time() - start < 0.5


def test_pack_takes_bounded_time_where_it_is_hard():
    """Even units and odd capacities: the total would fit, but a byte of each bin stays empty."""
    sizes = [2 * random.Random(n).randrange(2**28, 2**30) for n in range(16)]
    half = sum(sizes) // 4 * 2
    capacities = [half + 1, sum(sizes) - half - 1]
    start = time.process_time()
    assert pack(sizes, capacities) is None
    assert time.process_time() - start < 10
