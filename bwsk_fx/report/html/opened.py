"""A graph with its regions opened: the nodes of the model, whether or not they were fused."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from bwsk_fx.reversible import ReversibleRegion


@dataclass(frozen=True)
class OpenedNode:
    """One node of the model.

    Attributes:
        node: The node, in the graph or in a region's subgraph.
        operator: What it calls, in words.
        inputs: The places of its operands among the opened nodes, each once.
        region: The region that it is fused into; empty for none.
    """

    node: fx.Node
    operator: str
    inputs: tuple[int, ...]
    region: str = ""


@dataclass(frozen=True)
class Opened:
    """A graph with its regions opened.

    Attributes:
        nodes: The nodes of the model in order, those of a fused region in place of its call.
        regions: For each region, the nodes of its subgraph in order, inputs first: name and place in `nodes`.
    """

    nodes: tuple[OpenedNode, ...]
    regions: Mapping[str, tuple[tuple[str, int], ...]]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Opened:
        """Open a graph."""
        opening = _Opening(graph)
        return cls(tuple(opening.nodes), opening.regions)


def regions_of(graph: fx.GraphModule) -> dict[str, ReversibleRegion]:
    """Return the fused regions of a graph by name, in the order in which they run."""
    called = (region_at(graph, node) for node in graph.graph.nodes)
    return {region.name: region for region in called if region is not None}


def region_at(graph: fx.GraphModule, node: Any) -> ReversibleRegion | None:
    """Return the region that a node calls, if it calls one."""
    if not (isinstance(node, fx.Node) and node.op == "call_module"):
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, ReversibleRegion) else None


class _Opening:
    """Walks a graph, and each region with the operands of its call."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.nodes: list[OpenedNode] = []
        self.regions: dict[str, tuple[tuple[str, int], ...]] = {}
        self._results: dict[fx.Node, tuple[int, ...]] = {}
        self._walk(graph)

    def _walk(self, graph: fx.GraphModule) -> None:
        places: dict[fx.Node, int] = {}
        for node in graph.graph.nodes:
            region = region_at(graph, node)
            if region is not None:
                self._results[node] = self._open(region, [places[operand] for operand in _operands(node)])
            elif node.target is operator.getitem and node.args[0] in self._results:
                places[node] = self._results[node.args[0]][node.args[1]]
            else:
                places[node] = self._add(graph, node, places)

    def _open(self, region: ReversibleRegion, arguments: Sequence[int]) -> tuple[int, ...]:
        given = iter(arguments)
        places: dict[fx.Node, int] = {}
        for node in region.subgraph.graph.nodes:
            if node.op == "placeholder":
                places[node] = next(given)
            elif node.op == "output":
                self.regions[region.name] = tuple((member.name, place) for member, place in places.items())
                return tuple(places[result] for result in node.args[0])
            else:
                places[node] = self._add(region.subgraph, node, places, region.name)
        return ()

    def _add(self, graph: fx.GraphModule, node: fx.Node, places: dict[fx.Node, int], region: str = "") -> int:
        inputs = dict.fromkeys(places[operand] for operand in node.all_input_nodes)
        self.nodes.append(OpenedNode(node, _words(graph, node), tuple(inputs), region))
        return len(self.nodes) - 1


def _operands(call: fx.Node) -> Iterator[fx.Node]:
    """The arguments of a region's call, of which one may stand several times."""
    return (argument for argument in call.args if isinstance(argument, fx.Node))


def _words(graph: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "get_attr", "output"):
        return {"placeholder": "input", "get_attr": "parameter or buffer", "output": "output"}[node.op]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
