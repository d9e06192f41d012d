import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwsk_fx.parallel.cuts import best_cuts

WHOLE = st.integers(0, 9).map(float)


def _exhaustive(loads, moved, stages, tolerance):
    """The least largest load, and the least moved with the tolerance, over all cuts."""
    options = []
    for cuts in combinations(range(1, len(loads)), stages - 1):
        bounds = [0, *cuts, len(loads)]
        largest = max(sum(loads[start:stop]) for start, stop in pairwise(bounds))
        options.append((largest, sum(moved[cut - 1] for cut in cuts), cuts))
    options = [option for option in options if math.isfinite(option[1])]
    if not options:
        return None
    least = min(largest for largest, _, _ in options)
    within = [option for option in options if option[0] <= least * (1 + tolerance) + 1e-9]
    cheapest = min(price for _, price, _ in within)
    return cheapest, min(largest for largest, price, _ in within if price == cheapest)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cuts_are_the_best_of_all(data):
    loads = data.draw(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9))
    count = len(loads) - 1
    moved = data.draw(st.lists(WHOLE | st.just(math.inf), min_size=count, max_size=count))
    stages = data.draw(st.integers(1, 4))
    tolerance = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    cuts = best_cuts(loads, moved, stages, tolerance)
    wanted = _exhaustive(loads, moved, stages, tolerance)
    assert (cuts is None) == (wanted is None)
    if cuts is not None:
        bounds = [0, *cuts, len(loads)]
        largest = max(sum(loads[start:stop]) for start, stop in pairwise(bounds))
        assert sum(moved[cut - 1] for cut in cuts) == wanted[0]
        assert largest == pytest.approx(wanted[1])


def test_cuts_that_move_nothing_are_balanced_too():
    assert best_cuts([1.0] * 4, [0.0] * 3, 2, 0.5) == (2,)


def test_balance_gives_way_to_bytes_within_the_tolerance():
    loads, moved = [4.0, 1.0, 5.0], [1.0, 100.0]
    assert best_cuts(loads, moved, 2, 0.0) == (2,)
    assert best_cuts(loads, moved, 2, 0.2) == (1,)
