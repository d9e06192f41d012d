"""One plan per region: against every choice tried out, and what is said where none fits."""

import random
from itertools import product
from math import inf

import pytest

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.allocate import Totals, fewest_kept, least_memory, least_time
from bwsk_fx.planning.plan import Plan

STEP = 1.0


def _plan(
    kept: int, extra: float, intensive: float = 0.0, forward: int = 0, backward: int = 0, gradients: int = 0
) -> Plan:
    return Plan(
        (), kept, 10 * kept, extra, intensive, STEP + extra, STEP, forward, backward, gradients, 0.0, "highs", ""
    )


def _random_choices(seed: int, regions: int = 4) -> list[list[Plan]]:
    """Plans as regions have them: less kept takes more time, and holds more on the way."""
    draw = random.Random(seed)
    choices = []
    for _ in range(regions):
        gradients, plans = draw.randrange(40), []
        for step in range(3):
            kept, extra = 100 - 30 * step - draw.randrange(20), 0.1 * step + 0.01 * draw.random()
            peaks = kept + draw.randrange(30), kept + 30 * step + draw.randrange(30)
            plans.append(_plan(kept, extra, extra if step else 0.0, *peaks, gradients))
        choices.append(plans)
    return choices


def _all(choices: list[list[Plan]], outside: int) -> list[Totals]:
    return [Totals.of(plans, outside) for plans in product(*choices)]


def _chosen(choices: list[list[Plan]], found: list[int], outside: int = 0) -> Totals:
    return Totals.of([plans[index] for plans, index in zip(choices, found, strict=True)], outside)


def test_totals_of_three_regions():
    plans = [_plan(10, 0.1, 0.0, 25, 30, 1), _plan(20, 0.2, 0.2, 50, 40, 2), _plan(5, 0.0, 0.0, 15, 60, 4)]
    totals = Totals.of(plans, outside=7)
    # Regions one to three hold, backwards: 30 + 2 + 4, 40 + 4 + 10, 60 + 30; forwards 25, 60, 45.
    assert totals.peak_bytes == 7 + 90
    assert (totals.kept_bytes, totals.conventional_bytes) == (42, 357)
    assert totals.extra_seconds == pytest.approx(0.3) and totals.intensive_seconds == pytest.approx(0.2)
    assert totals.overhead == pytest.approx(0.1)
    assert str(totals) == "12% of eager's, modelled time +10.0%, peak 97 B"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.01, 0.06, 0.1, 0.3])
def test_no_choice_holds_less_within_the_budget(seed, budget):
    choices, outside = _random_choices(seed), 5
    found = _chosen(choices, least_memory(choices, budget, outside), outside)
    cheap = sum(plans[0].extra_seconds for plans in choices)
    most = max(budget * 4 * STEP, cheap) + 1e-9
    fitting = [
        one
        for one in _all(choices, outside)
        if one.extra_seconds <= most and one.intensive_seconds <= budget * 4 * STEP + 1e-9
    ]
    assert found.extra_seconds <= most
    least = min(one.peak_bytes for one in fitting)
    assert least <= found.peak_bytes <= least * 1.02


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_no_choice_takes_less_time_within_the_peak(seed, share):
    choices = _random_choices(seed)
    everything = _all(choices, 0)
    least, most = min(one.peak_bytes for one in everything), max(one.peak_bytes for one in everything)
    peak = int(least + share * (most - least))
    found = _chosen(choices, least_time(choices, peak=peak))
    assert found.peak_bytes <= peak
    best = min(one.extra_seconds for one in everything if one.peak_bytes <= peak)
    assert found.extra_seconds <= best + 0.005


def test_kept_bytes_can_be_bounded():
    choices = _random_choices(0)
    found = _chosen(choices, least_time(choices, kept=250, outside=20), 20)
    best = min(one.extra_seconds for one in _all(choices, 20) if one.kept_bytes <= 250)
    assert found.kept_bytes <= 250 and found.extra_seconds <= best + 0.005


def test_the_fewest_kept_bytes():
    choices = [[_plan(9, 0.0), _plan(5, 0.1), _plan(2, 0.3, 0.2)], [_plan(4, 0.0)]]
    assert fewest_kept(choices, 0.0) == [1, 0]
    assert fewest_kept(choices, inf) == [2, 0]


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"peak": 50}, "no choice of plans within 50 B: a training step needs at least 60 B"),
        ({"kept": 9}, "no choice of plans within 9 B: a training step needs at least 10 B"),
        (
            {"peak": 65, "budget": 0.1},
            "no choice of plans within 65 B: a training step within a budget of 0.1 needs at least 70 B",
        ),
    ],
)
def test_what_does_not_fit_is_told_how_much_is_needed(bound, message):
    choices = [[_plan(20, 0.0, 0.0, 20, 70), _plan(10, 0.5, 0.5, 20, 60)]]
    with pytest.raises(PlanError) as failure:
        least_time(choices, **bound)
    assert str(failure.value) == message
