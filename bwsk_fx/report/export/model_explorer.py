"""Node data for Google's Model Explorer: the verdict and the erasure of each node, by the node's id.

The layout is that of `ModelNodeData` and `GraphNodeData` in `model_explorer.node_data_builder`
(github.com/google-ai-edge/model-explorer).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.errors import RuleError
from bwsk_fx.report.colours import INK, LABEL_COLOURS
from bwsk_fx.report.records import NodeRecord, records

# What Model Explorer calls the graph of a PyTorch program.
GRAPH_ID = "graph"
_HIDDEN = ["min", "max", "sum", "avg"]
# Shares of the largest amount, from pale to dark.
_STEPS = ((0.01, "#fdf2dc"), (0.1, "#f9dda6"), (0.5, "#f0bd4f"), (1.0, "#e69f00"))


def model_explorer_data(
    graph: fx.GraphModule, data: str = "verdict", *, graph_id: str = GRAPH_ID
) -> dict[str, dict[str, Any]]:
    """Return node data for Google's Model Explorer, ready for `json.dump`.

    Model Explorer shows a `.pt2` file of `torch.export` with the names of its fx nodes as ids; type the graph of that
    file (`bwsk-fx inspect model.pt2 --model-explorer FILE`) and load the result beside it.

    Args:
        graph: A graph that `type_nodes` has labelled.
        data: `"verdict"`: the label of each counted node, one colour each. `"erased_elements"`, `"erased_bits"`: the
            amount per sample of each K node whose rule knows it, with thresholds at 1, 10, 50 and 100 % of the
            largest.
        graph_id: The id of the graph in Model Explorer.

    Returns:
        `{graph_id: {"results": {node: {"value": …}}, …}}`.

    Raises:
        RuleError: The graph is not typed, or there is no such data.
    """
    require_graph(graph)
    counted = [record for record in records(graph) if record.counted]
    if data == "verdict":
        return {graph_id: _verdicts(counted)}
    if data not in ("erased_elements", "erased_bits"):
        raise RuleError(f"there is no node data '{data}'; there are verdict, erased_elements and erased_bits")
    return {graph_id: _amounts({record.name: getattr(record, data) for record in counted})}


def _verdicts(counted: list[NodeRecord]) -> dict[str, Any]:
    results = {
        record.name: {"value": str(record.label), "bgColor": LABEL_COLOURS[record.label], "textColor": INK}
        for record in counted
    }
    return {
        "results": results,
        "hideAggregatedStats": _HIDDEN,
        "showExpandedSummaryOnGroupNode": True,
        "showLabelCountColumnsInChildrenStatsTable": True,
    }


def _amounts(found: dict[str, float | None]) -> dict[str, Any]:
    known = {name: amount for name, amount in found.items() if amount is not None}
    largest = max(known.values(), default=0)
    thresholds = [{"value": share * largest, "bgColor": colour, "textColor": INK} for share, colour in _STEPS]
    return {
        "results": {name: {"value": amount} for name, amount in known.items()},
        "thresholds": thresholds if largest else [],
    }
