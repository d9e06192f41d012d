"""Options of a plan: what is refused, what a tier stands for, and sizes in words."""

import math

import pytest

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.options import TIERS, PlanOptions, bytes_of, plan_options, show_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -0.1}, "budget is -0.1: expected a fraction of a training step, 0.0 or more"),
        ({"budget": math.nan}, "budget is nan: expected a fraction of a training step, 0.0 or more"),
        ({"budget": "much"}, "budget is 'much': expected a fraction of a training step, 0.0 or more"),
        ({"budget": True}, "budget is True: expected a fraction of a training step, 0.0 or more"),
        ({"faith": "loose"}, "faith is 'loose': expected one of 'rounded', 'exact'"),
        ({"costs": "free"}, "costs is 'free': expected one of 'builtin', 'roofline', 'measured'"),
        ({"compiler": "gcc"}, "compiler is 'gcc': expected one of 'eager', 'inductor'"),
        ({"memory": "much"}, "memory is 'much': expected a number of bytes above zero, or a text such as '1.5GiB'"),
        ({"memory": 0}, "memory is 0: expected a number of bytes above zero, or a text such as '1.5GiB'"),
        (
            {"activation_fraction": 1.5},
            "activation_fraction is 1.5: expected a share of eager's kept bytes, above 0 up to 1",
        ),
        (
            {"activation_fraction": 0.5, "memory": 1},
            "memory and activation_fraction are two bounds of one thing: give one of them",
        ),
        (
            {"compiler": "inductor", "faith": "exact"},
            "faith='exact' promises eager's bits, which compiler='inductor' does not give: use 'rounded'",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PlanError) as failure:
        PlanOptions(**options)
    assert str(failure.value) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5GiB", 3 * 2**29), ("512 MiB", 2**29), ("2kb", 2000), ("7", 7), ("1 GB", 10**9), (4096, 4096), ("8b", 8)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size == PlanOptions(memory=text).memory


def test_sizes_for_people():
    assert [show_bytes(count) for count in (5, 1536, 3 * 2**19, 2**31)] == ["5 B", "1.50 KiB", "1.50 MiB", "2.00 GiB"]


@pytest.mark.parametrize("name", TIERS)
def test_a_tier_stands_for_its_options(name):
    assert plan_options(tier=name) == TIERS[name]
    assert plan_options(tier=name, costs="measured").costs == "measured"


def test_tiers():
    assert (TIERS["exact"].faith, TIERS["exact"].budget) == ("exact", 0.0)
    assert 0.0 < TIERS["balanced"].budget < TIERS["smallest"].budget == math.inf


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (None, {"tier": "huge"}, "tier is 'huge': expected one of 'exact', 'balanced', 'smallest'"),
        (0.1, {"tier": "exact"}, "tier='exact' stands for a budget and a faith: give the tier, or the two of them"),
        (
            None,
            {"tier": "exact", "faith": "exact"},
            "tier='exact' stands for a budget and a faith: give the tier, or the two of them",
        ),
    ],
)
def test_one_thing_said_twice(budget, options, message):
    with pytest.raises(PlanError) as failure:
        plan_options(budget, **options)
    assert str(failure.value) == message


def test_an_unknown_option_is_named():
    with pytest.raises(PlanError, match="there is no option 'bugdet': expected one of activation_fraction, budget,"):
        plan_options(bugdet=0.1)


def test_time_is_unbounded_where_memory_is_given_alone():
    assert plan_options(memory=10).budget == plan_options(activation_fraction=0.5).budget == math.inf
    assert plan_options(0.1, memory=10).budget == 0.1
    assert plan_options().budget == 0.0


@pytest.mark.parametrize(
    ("options", "local"),
    [({}, True), ({"budget": math.inf}, True), ({"budget": 0.1}, False), ({"memory": 10, "budget": 0.0}, False)],
)
def test_regions_that_share_nothing_are_planned_one_by_one(options, local):
    assert PlanOptions(**options).is_local is local
