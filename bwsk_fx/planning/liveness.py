"""How many bytes a generated graph holds at its worst moment, read off the graph."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from bwsk_fx.planning.joint import nbytes
from bwsk_fx.planning.views import base_of


def peak_bytes(graph: fx.Graph, uncounted: Collection[fx.Node] = ()) -> int:
    """Return the most bytes alive at one time while `graph` runs as generated code, which frees after the last use.

    Counted: every tensor that a node makes or takes out of a list, from there to the last use of it or of a view of it;
    what the graph returns lives to the end, and so do its inputs, which the caller holds. Not counted: work space
    inside an operator.

    Args:
        graph: Nodes with recorded values.
        uncounted: Nodes whose memory is somebody else's, such as parameters.
    """
    last_use = _last_uses(graph)
    alive = peak = 0
    freed_after: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if base_of(node) is node and node not in uncounted:
            alive += nbytes(node)
            freed_after[last_use[node]] = freed_after.get(last_use[node], 0) + nbytes(node)
        peak = max(peak, alive)
        alive -= freed_after.get(node, 0)
    return peak


def _last_uses(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return, for every node that is no view, the last node that reads it or a view of it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for value in (node, *node.all_input_nodes):
            last[base_of(value)] = node
    return last | dict.fromkeys(graph.find_nodes(op="placeholder"), graph.output_node())
