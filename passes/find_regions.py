"""`FindRegions`: which nodes are fused into one reversible region."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, TypeGuard

import networkx as nx
import torch
from torch import fx, nn

from bwsk_fx._hooks import hooked_inside
from bwsk_fx._side_effects import STAYS_OUTSIDE
from bwsk_fx.blocks import block_of
from bwsk_fx.errors import PlanError
from bwsk_fx.passes.pipeline import Pass, PassResult
from bwsk_fx.verdict import Label

GRANULARITIES = ("block", "s-run", "whole")
REGION = "region"
# A region of one operator has no interior to rebuild.
_LEAST_NODES = 2


@dataclass(frozen=True)
class FindRegions(Pass):
    """Write `node.meta["region"]`, the region's name, on every node that belongs to one.

    A region is a connected part of an interval of the execution order, hence convex.

    Attributes:
        granularity: `block`: one region per repeated block, and one for each stretch between them; `s-run`: the
            maximal runs of nodes labelled S; `whole`: everything.
    """

    name: ClassVar[str] = "find-regions"
    granularity: str = "block"

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            known = ", ".join(map(repr, GRANULARITIES))
            raise PlanError(f"granularity is {self.granularity!r}: expected one of {known}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Assign the regions.

        Raises:
            PlanError: `s-run` was asked for and the graph has no labels.
        """
        for node in graph_module.graph.nodes:
            node.meta.pop(REGION, None)
        names: set[str] = set()
        for key, members in self._intervals(graph_module):
            for part in _connected(members):
                if len(part) >= _LEAST_NODES:
                    name = _unused(str(key), names)
                    for node in part:
                        node.meta[REGION] = name
        return PassResult(graph_module, False)

    def _intervals(self, graph_module: fx.GraphModule) -> Iterator[tuple[Hashable, list[fx.Node]]]:
        """Cut the execution order wherever the key changes; nodes that no region can hold cut it too."""
        current: Hashable = None
        members: list[fx.Node] = []
        for node in graph_module.graph.nodes:
            if _floats(node):
                continue
            key = self._key(node) if _can_join(node, graph_module) else None
            if key != current and members:
                yield current, members
                members = []
            current = key
            if key is not None:
                members.append(node)
        if members:
            yield current, members

    def _key(self, node: fx.Node) -> Hashable:
        if node.target is operator.getitem and _is_tuple_of_tensors(node.args[0]):
            # A part stays with the tuple that it is taken from: only tensors cross a region's border.
            return self._key(node.args[0])
        if self.granularity == "whole":
            return "whole"
        if self.granularity == "block":
            return block_of(node) or "segment"
        if "bwsk" not in node.meta:
            raise PlanError(f"node {node.name} has no label: run TypeNodes before FindRegions(granularity='s-run')")
        return "s_run" if node.meta["bwsk"].label is Label.S else None


def _floats(node: fx.Node) -> bool:
    """Whether a node can move to wherever it is read: sizes of inputs, attributes, placeholders."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    is_size = isinstance(node.meta.get("val"), (int, torch.SymInt)) and not node.is_impure()
    return is_size and all(map(_floats, node.all_input_nodes))


def _can_join(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    values = [node, *(operand for operand in node.all_input_nodes if not _floats(operand))]
    if not all(isinstance(value.meta.get("val"), torch.Tensor) or _is_tuple_of_tensors(value) for value in values):
        return False
    if STAYS_OUTSIDE in node.meta:
        return False
    return node.op != "call_module" or _can_run_again(graph_module.get_submodule(str(node.target)))


def _is_tuple_of_tensors(node: object) -> TypeGuard[fx.Node]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, (tuple, list)) and all(isinstance(item, torch.Tensor) for item in value)


def _can_run_again(module: nn.Module) -> bool:
    """Whether running the module twice changes no buffer twice, and not running it calls no hook too few."""
    updates_state = bool(getattr(module, "track_running_stats", False)) and module.training
    return not updates_state and not hooked_inside(module)


def _connected(members: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Split an interval into weakly connected parts, each an interval itself: random operators keep their order."""
    inside = set(members)
    edges = nx.Graph()
    edges.add_nodes_from(members)
    edges.add_edges_from((operand, node) for node in members for operand in node.all_input_nodes if operand in inside)
    part_of = {node: index for index, part in enumerate(nx.connected_components(edges)) for node in part}
    runs = [list(run) for _, run in groupby(members, key=part_of.__getitem__)]
    if len(runs) == len(set(part_of.values())):
        return runs
    return [part for run in runs for part in _connected(run)]


def _unused(key: str, names: set[str]) -> str:
    base, count = key.replace(".", "_"), 0
    name = f"{base}_0" if key in ("segment", "s_run") else base
    while name in names:
        count += 1
        name = f"{base}_{count}"
    names.add(name)
    return name
