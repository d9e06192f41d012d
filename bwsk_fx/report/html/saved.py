"""What the backward pass needs, value by value, as the page's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bwsk_fx.planning.plan import PlannedValue
from bwsk_fx.report.html.nodes import portable
from bwsk_fx.report.html.opened import Opened
from bwsk_fx.report.saved import RegionPlan

_WHY = {"keep": "needed by {}", "recompute": "run again: {}", "invert": "inverse: {}"}


def saved_rows(plans: Sequence[RegionPlan], opened: Opened, places: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a row per value that the backward pass needs, with the place of the node that made it.

    Equal regions share what was traced, which names the nodes of one of them; each region gets rows of its own.

    Args:
        plans: The plan of each region, in execution order.
        opened: The nodes of the model.
        places: The place of each region in the page's list of regions.
    """
    traced: dict[str, str] = {}
    rows = []
    for entry in plans:
        first = traced.setdefault(entry.plan.fingerprint, entry.region)
        own = dict(opened.regions[entry.region])
        if not {value.node for value in entry.plan.values if value.node} <= own.keys():
            own = _twins(opened, first, entry.region)
        rows += [_row(value, places[entry.region], own.get(value.node, -1)) for value in entry.plan.values]
    return rows


def _twins(opened: Opened, traced: str, region: str) -> dict[str, int]:
    """Return the places of a region's nodes by the names of the nodes in the region that was traced for it.

    Empty where the two are put together otherwise, and only what PyTorch runs for them is the same.
    """
    if _operators(opened, traced) != _operators(opened, region):
        return {}
    names = (name for name, _ in opened.regions[traced])
    return dict(zip(names, (place for _, place in opened.regions[region]), strict=True))


def _operators(opened: Opened, region: str) -> list[str]:
    """Return what a region calls; of its inputs, which come from elsewhere, only that they are there."""
    nodes = (opened.nodes[place] for _, place in opened.regions[region])
    return [node.operator if node.region == region else "" for node in nodes]


def _row(value: PlannedValue, region: int, node: int) -> dict[str, Any]:
    return {
        "name": value.name,
        "node": node,
        "region": region,
        "operator": value.operator,
        "shape": list(map(str, value.shape)),
        "dtype": value.dtype,
        "bytes": value.bytes,
        "action": value.action,
        "why": _WHY[value.action].format(value.rule or "nothing that is known"),
        "sources": list(value.sources),
        "source": portable(value.source),
    }
