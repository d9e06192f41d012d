"""Typed graphs as networkx graphs and as GraphML."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx
from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.report.files import write_text
from bwsk_fx.report.records import NodeRecord, records


def to_networkx(graph: fx.GraphModule) -> nx.MultiDiGraph:
    """Return a typed graph for networkx: a node per fx node, under its name, and an edge per value that it reads.

    Args:
        graph: A graph that `type_nodes` has labelled; it stays as it is.

    Returns:
        A graph whose nodes have `op`, `target`, `operator`, `verdict` (`"S"`, `"K"`, `"GRAY"`), `witness`, `rationale`,
        `confidence`, `counted`, `erased_elements` and `erased_bits` (per sample, or None), `module` (path of the
        module around the node), `line` (`file:line` of the model's code), `shapes` (one list of sizes per tensor of
        the value), `dtypes`, `bytes` (per sample, or None) and `region`. All are plain Python values. Nodes are in
        execution order. An edge has the key `"0"`, `"1"`, … of its place among the reader's inputs, also as
        attribute `place`: a node that reads a value twice has two.

    Raises:
        RuleError: The graph is not typed.
    """
    require_graph(graph)
    network = nx.MultiDiGraph()
    found = records(graph)
    for record in found:
        network.add_node(record.name, **_attributes(record))
    for node in graph.graph.nodes:
        for place, source in enumerate(_reads(node)):
            network.add_edge(source, node.name, key=str(place), place=place)
    return network


def save_graphml(graph: fx.GraphModule, path: str | Path) -> None:
    """Write a typed graph as GraphML, which Gephi, yEd, Cytoscape and networkx read.

    Attributes are those of `to_networkx`. Shapes and dtypes are JSON texts, since GraphML has no lists, and an amount
    that is not known is left out.

    Args:
        graph: A graph that `type_nodes` has labelled.
        path: The file; one that is there is replaced.

    Raises:
        BwskError: The graph is not typed, or the file cannot be written.
    """
    require_graph(graph)
    network = to_networkx(graph)
    for _, attributes in network.nodes(data=True):
        for name, value in list(attributes.items()):
            if value is None:
                del attributes[name]
            elif isinstance(value, list):
                attributes[name] = json.dumps(value)
    buffer = BytesIO()
    nx.write_graphml(network, buffer, named_key_ids=True)
    write_text(path, buffer.getvalue().decode())


def _attributes(record: NodeRecord) -> dict[str, Any]:
    return {
        "op": record.op,
        "target": record.target,
        "operator": record.operator,
        "verdict": str(record.label),
        "witness": record.witness,
        "rationale": record.rationale,
        "confidence": record.confidence,
        "counted": record.counted,
        "erased_elements": _number(record.erased_elements),
        "erased_bits": _number(record.erased_bits),
        "module": record.module,
        "line": record.source,
        "shapes": [list(shape) for shape in record.shapes],
        "dtypes": list(record.dtypes),
        "bytes": record.bytes,
        "region": record.region,
    }


def _number(amount: float | None) -> float | None:
    # GraphML gives an attribute one type.
    return None if amount is None else float(amount)


def _reads(node: fx.Node) -> list[str]:
    """Return the names of the nodes among a node's arguments, repeated ones as often as they are there."""
    found: list[str] = []
    fx.node.map_arg((node.args, node.kwargs), lambda source: found.append(source.name))
    return found
