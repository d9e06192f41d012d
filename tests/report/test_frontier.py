"""The frontier in one call: what each budget buys, without running anything."""

import json
from math import inf

import pytest
import torch

import bwsk_fx
from bwsk_fx.errors import PlanError

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def graph(make_vit, make_images):
    model = make_vit(num_hidden_layers=4, hidden_size=128, intermediate_size=512, num_attention_heads=2)
    return bwsk_fx.capture(model, make_images())


@pytest.fixture(scope="module")
def frontier(graph, make_images):
    with torch.autocast("cpu", BF16):
        return bwsk_fx.plan_frontier(graph, make_images(32))


def test_more_time_buys_less_memory(frontier):
    totals = [point.totals for point in frontier.points]
    assert len(totals) >= 3
    assert [one.planned_seconds for one in totals] == sorted(one.planned_seconds for one in totals)
    kept = [one.kept_bytes for one in totals]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.5 * kept[0]


@pytest.mark.parametrize("budget", [0.0, 0.15, inf])
def test_a_point_is_what_the_budget_gives(graph, make_images, budget):
    with torch.autocast("cpu", BF16):
        (point,) = bwsk_fx.plan_frontier(graph, make_images(32), [budget]).points
        fused = bwsk_fx.fuse_regions(graph, budget)
        fused(**make_images(32))
    assert bwsk_fx.explain_saved(fused).totals == point.totals


def test_inverses_pay(graph, make_images):
    with torch.autocast("cpu", BF16):
        points = [
            bwsk_fx.plan_frontier(graph, make_images(32), [inf], inverses=inverses).points[0]
            for inverses in (True, False)
        ]
    assert points[0].totals.kept_bytes < 0.85 * points[1].totals.kept_bytes


def test_no_point_beats_another(frontier):
    for one in frontier.points:
        for other in frontier.points:
            less = one.totals.peak_bytes < other.totals.peak_bytes and one.totals.kept_bytes < other.totals.kept_bytes
            assert not (less and one.totals.planned_seconds < other.totals.planned_seconds)


def test_table_and_json(frontier):
    lines = str(frontier).splitlines()
    assert lines[0].split() == ["budget", "modelled", "time", "kept", "of", "eager's", "peak"]
    assert len(lines) == 2 + len(frontier.points)
    rows = json.loads(json.dumps(frontier.to_json()))["points"]
    assert [row["kept_bytes"] for row in rows] == [point.totals.kept_bytes for point in frontier.points]
    assert rows[-1]["budget"] is None and rows[0]["budget"] == frontier.points[0].budget


def test_options_are_checked(graph, make_images):
    with pytest.raises(PlanError, match="budget is -1"):
        bwsk_fx.plan_frontier(graph, make_images(), [-1])
