"""Where to cut a sequence into stages: the load balanced, the least moved. Exact, in time linear in the sequence."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

_HALVINGS = 30


def best_cuts(loads: Sequence[float], moved: Sequence[float], stages: int, tolerance: float) -> tuple[int, ...] | None:
    """Cut a sequence of items into stages.

    Of all cuts whose largest stage has at most (1 + tolerance) times the least load that a largest stage can have, the
    one that moves the least is taken, and of those one with the least largest stage.

    Args:
        loads: The load of each item.
        moved: What a cut before item 1, 2, … moves (one fewer than items); infinity where no cut is allowed.
        stages: How many stages.
        tolerance: How much the largest load may exceed the least possible.

    Returns:
        The index of the first item of each stage but the first; None where there are too few allowed places.
    """
    places = [0, *(index for index, bytes_moved in enumerate(moved, start=1) if math.isfinite(bytes_moved)), len(loads)]
    total = [0.0, *accumulate(loads)]
    before = [total[place] for place in places]
    costs = [0.0, *(moved[place - 1] for place in places[1:-1]), 0.0]
    if len(places) < stages + 1:
        return None
    least = _least_largest(before, stages)
    bound = least * (1 + tolerance)
    found = _least_moved(before, costs, stages, bound)
    assert found is not None
    low, high = least, bound
    for _ in range(_HALVINGS if stages > 1 else 0):
        middle = (low + high) / 2
        tighter = _least_moved(before, costs, stages, middle)
        if tighter is not None and tighter[0] <= found[0]:
            found, high = tighter, middle
        else:
            low = middle
    return tuple(places[index] for index in found[1])


def _least_largest(before: Sequence[float], stages: int) -> float:
    """Return the least possible load of the largest stage; `before` has the load before each place."""
    count = len(before)
    best = list(before)
    for stage in range(2, stages + 1):
        # The best of the stages so far grows with the last cut, and the load after it shrinks: they cross once.
        best = [math.inf if end < stage else _crossing(best, before, end, stage - 1) for end in range(count)]
    return best[-1]


def _crossing(best: Sequence[float], before: Sequence[float], end: int, first: int) -> float:
    def grows_past(cut: int) -> bool:
        return best[cut] >= before[end] - before[cut]

    cut = bisect_left(range(end), True, lo=first, key=grows_past)
    candidates = [other for other in (cut - 1, cut) if first <= other < end]
    return min(max(best[other], before[end] - before[other]) for other in candidates)


def _least_moved(
    before: Sequence[float], costs: Sequence[float], stages: int, bound: float
) -> tuple[float, list[int]] | None:
    """Return the least that can be moved with no stage above `bound`, and the places to cut at."""
    slack = bound * 1e-12
    best: list[float] = [0.0 if load <= bound + slack else math.inf for load in before]
    best[0] = math.inf
    chosen: list[list[int]] = []
    for _ in range(1, stages):
        best, came_from = _next_stage(before, costs, best, bound + slack)
        chosen.append(came_from)
    if math.isinf(best[-1]):
        return None
    cuts, end = [], len(before) - 1
    for came_from in reversed(chosen):
        end = came_from[end]
        cuts.append(end)
    return best[-1], cuts[::-1]


def _next_stage(
    before: Sequence[float], costs: Sequence[float], best: Sequence[float], bound: float
) -> tuple[list[float], list[int]]:
    """Add one stage: for each end, the cheapest cut whose stage stays within the bound, by a sliding minimum."""
    result, came_from = [math.inf] * len(before), [0] * len(before)
    window: deque[tuple[float, int]] = deque()
    for end in range(1, len(before)):
        cut = end - 1
        price = best[cut] + costs[cut]
        while window and window[-1][0] >= price:
            window.pop()
        window.append((price, cut))
        while window and before[end] - before[window[0][1]] > bound:
            window.popleft()
        if window:
            result[end], came_from[end] = window[0]
    return result, came_from
