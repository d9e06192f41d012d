"""What rewriting made of a graph, region by region, as the page's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import fx

from bwsk_fx.report.html.opened import Opened, region_at, regions_of
from bwsk_fx.report.saved import RegionPlan
from bwsk_fx.reversible import ReversibleRegion


def region_rows(graph: fx.GraphModule, opened: Opened, plans: Sequence[RegionPlan]) -> list[dict[str, Any]]:
    """Return a row per region: the nodes that went into it, what it reads and returns, and its plan where there is one.

    Args:
        graph: What `fuse_regions` returned.
        opened: The nodes of the model.
        plans: The plan of each region that has one.
    """
    planned = {entry.region: entry for entry in plans}
    return [_row(region, opened, planned.get(name)) for name, region in regions_of(graph).items()]


def _row(region: ReversibleRegion, opened: Opened, entry: RegionPlan | None) -> dict[str, Any]:
    names = dict(opened.regions[region.name])
    graph = region.subgraph.graph
    inputs = [names[node.name] for node in graph.find_nodes(op="placeholder")]
    results: Any = graph.output_node().args[0]
    row = {
        "name": region.name,
        "options": str(region.options),
        "nodes": [place for place in names.values() if place not in set(inputs)],
        "inputs": inputs,
        "outputs": [names[node.name] for node in results],
    }
    if entry is None:
        return row
    plan = entry.plan
    sizes = {"kept": plan.kept_bytes, "conventional": plan.conventional_bytes, "overhead": plan.overhead}
    return row | {"plan": sizes | {"solver": plan.solver}}


def rewritten(graph: fx.GraphModule, opened: Opened, places: Mapping[str, int]) -> dict[str, Any]:
    """Return how many nodes the graph has before and after, and what became of them in the order of execution.

    Returns:
        `before` and `after`: numbers of nodes. `steps`: regions, as `{"region": place}`, and stretches of nodes
        that stayed, as `{"nodes": places}`.
    """
    steps: list[dict[str, Any]] = []
    for name, group in groupby(enumerate(opened.nodes), key=lambda each: each[1].region):
        members = [place for place, _ in group]
        steps.append({"region": places[name]} if name else {"nodes": members})
    calls = sum(region_at(graph, node) is not None for node in graph.graph.nodes)
    return {"before": len(opened.nodes), "after": len(graph.graph.nodes), "calls": calls, "steps": steps}
