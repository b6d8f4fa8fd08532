"""Units of a model, in the order in which they run, divided over devices: which bin each unit goes to.

Sizes (at least 0) and capacities (a negative one counts as 0) are integers in bytes; arithmetic is exact. A result is
the bin index of every unit, or None. In a contiguous partition it never decreases from unit to unit; bins may be empty.

Next-fit decides whether there is a contiguous one: by induction over the bins, none holds a longer prefix of the units
in its first j bins, since what another has in bin j beyond next-fit's prefix before it also fits next-fit's bin j.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

_EXACT = 16  # units up to which `pack` searches all subsets: 2^16 of them take about half a second


def fill(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """Next-fit: each bin is filled as far as it goes before the next; None if no contiguous partition fits."""
    bins: list[int] = []
    current, load = 0, 0
    for size in sizes:
        while current < len(capacities) and load + size > max(capacities[current], 0):
            current, load = current + 1, 0
        if current == len(capacities):
            return None
        bins.append(current)
        load += size
    return bins


def balance(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """The contiguous partition with the least largest load, and among those the least sum of squared loads.

    Among equals the last bin takes the fewest units, then the last but one, and so on: empty bins come last.
    None if no contiguous partition fits.
    """
    if fill(sizes, capacities) is None:
        return None
    low, total = max(sizes, default=0), sum(sizes)
    most = bisect_left(range(total), 1, low, key=lambda m: fill(sizes, [min(c, m) for c in capacities]) is not None)
    ends = [0, *accumulate(sizes)]
    costs, cuts = [0], []  # without a bin, only the empty prefix is held
    for capacity in capacities:
        costs, starts = _add_bin(ends, costs, max(min(capacity, most), 0))
        cuts.append(starts)
    bins, end = [0] * len(sizes), len(sizes)
    for index in reversed(range(len(cuts))):
        start = cuts[index][end]
        bins[start:end] = [index] * (end - start)
        end = start
    return bins


def _add_bin(ends: list[int], costs: list[int], room: int) -> tuple[list[int], list[int]]:
    """One step of the dynamic programme: the costs with one bin more, of capacity ``room``, and where that bin starts.

    ``ends[i]`` is the total size of the first i units; ``costs[i]`` the least sum of squared loads of the bins so far
    that hold just those, for every i that they can hold.
    """
    held = len(costs) - 1
    reach = bisect_right(ends, ends[held] + room) - 1
    best, starts = [0] * (reach + 1), [0] * (reach + 1)
    # The squared load satisfies the quadrangle inequality, so the latest best start never decreases with the prefix;
    # divide and conquer then needs O(n log n) comparisons, where a window of what fits can be as wide as all units.
    todo = [(0, reach, 0, held)]
    while todo:
        first, last, left, right = todo.pop()
        if first <= last:
            i = (first + last) // 2
            window = range(max(left, bisect_left(ends, ends[i] - room)), min(right, i) + 1)
            best[i], negated = min((costs[k] + (ends[i] - ends[k]) ** 2, -k) for k in window)
            starts[i] = -negated
            todo += [(first, i - 1, left, starts[i]), (i + 1, last, starts[i], right)]
    return best, starts


def balance_low_first(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """As `balance`, but bin 0 takes the shortest prefix that lets the rest fit the others, which are balanced."""
    if len(capacities) < 2:
        return fill(sizes, capacities)
    # filled from the end, the other bins hold the longest suffix there is; bin 0, come last, takes what they leave
    backwards = fill(sizes[::-1], [*capacities[:0:-1], sum(sizes)]) or []
    first = backwards.count(len(capacities) - 1)
    head, rest = fill(sizes[:first], capacities[:1]), balance(sizes[first:], capacities[1:])
    return None if head is None or rest is None else [*head, *(b + 1 for b in rest)]


def pack(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """A partition that need not be contiguous: first-fit decreasing, and if that fails an exact search.

    Above 16 units there is no exact search, and None means only that none was found.
    """
    order = sorted(range(len(sizes)), key=lambda unit: -sizes[unit])
    bins, left = [0] * len(sizes), [max(c, 0) for c in capacities]
    for unit in order:
        index = next((b for b, room in enumerate(left) if sizes[unit] <= room), None)
        if index is None:
            break
        bins[unit] = index
        left[index] -= sizes[unit]
    else:
        return bins
    found = _search([sizes[unit] for unit in order], capacities) if len(order) <= _EXACT else None
    return found and [index for _, index in sorted(zip(order, found, strict=True))]


def _search(sizes: list[int], capacities: Sequence[int]) -> list[int] | None:
    """`fill` over all orders of the units (given by decreasing size), by dynamic programming over subsets.

    Of a subset's orders only that with the least (bin, load) counts: what can follow another can follow it. So the time
    is bounded by the number of subsets, where branching over bins would take bins^units in the worst case.
    """
    rooms = [max(c, 0) for c in capacities]
    full, spare = (1 << len(sizes)) - 1, sum(rooms) - sum(sizes)
    states: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}  # bin, load of that bin, unit placed last
    for subset in range(full):
        if (state := states.get(subset)) is None:
            continue
        placed = sum(size for unit, size in enumerate(sizes) if subset >> unit & 1)
        if sum(rooms[: state[0]]) + state[1] - placed > spare:
            continue  # the bins before have too much room left over
        for unit, size in enumerate(sizes):
            current, load, _ = state
            while current < len(rooms) and load + size > rooms[current]:
                current, load = current + 1, 0
            reached = (current, load + size, unit)
            if current < len(rooms) and not subset >> unit & 1:
                states[subset | 1 << unit] = min(reached, states.get(subset | 1 << unit, reached))
    bins, subset = [0] * len(sizes), full
    while subset in states and subset:
        current, _, unit = states[subset]
        bins[unit] = current
        subset ^= 1 << unit
    return None if subset else bins
