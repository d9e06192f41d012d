"""`FindRegions`: which nodes are fused into one reversible region."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, TypeGuard

import networkx as nx
import torch
from torch import fx, nn

from bwsk_fx import _torch_private as private
from bwsk_fx._hooks import hooked_inside
from bwsk_fx._side_effects import CHANGES, STAYS_OUTSIDE
from bwsk_fx._state_watch import WRITES
from bwsk_fx.blocks import block_of
from bwsk_fx.errors import PlanError
from bwsk_fx.inplace import is_read_again, written_operand
from bwsk_fx.passes.pipeline import Pass, PassResult
from bwsk_fx.signature import tensors_of
from bwsk_fx.statistics import updates_statistics
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
        for key, part in self._parts(graph_module):
            name = _unused(str(key), names)
            for node in part:
                node.meta[REGION] = name
        return PassResult(graph_module, False)

    def _parts(self, graph_module: fx.GraphModule) -> list[tuple[Hashable, list[fx.Node]]]:
        """Return what becomes a region; memory that is written into across a border stays outside."""
        state = _State.of(graph_module)
        while True:
            parts = [
                (key, part)
                for key, members in self._intervals(graph_module, state)
                for part in _connected(members)
                if len(part) >= _LEAST_NODES
            ]
            across = _written_across(graph_module, [part for _, part in parts])
            if across <= state.storages_kept_out:
                return parts
            state = replace(state, storages_kept_out=state.storages_kept_out | across)

    def _intervals(self, graph_module: fx.GraphModule, state: _State) -> Iterator[tuple[Hashable, list[fx.Node]]]:
        """Cut the execution order wherever the key changes; nodes that no region can hold cut it too."""
        current: Hashable = None
        members: list[fx.Node] = []
        for node in graph_module.graph.nodes:
            if _floats(node):
                continue
            key = self._key(node) if _can_join(node, state) else None
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


@dataclass(frozen=True)
class _State:
    """What a graph writes into besides its activations; in the backward pass it is not what it was when it was read.

    Attributes:
        graph_module: The graph.
        tensors: The identities of the parameters and buffers that a node writes into.
        storages: What the values of nodes that read them share.
        norms: Batch norms that write into buffers which no other node uses: a region does that for them.
        storages_kept_out: Memory of activations of which no region may make a tensor.
    """

    graph_module: fx.GraphModule
    tensors: frozenset[int]
    storages: frozenset[Hashable]
    norms: frozenset[fx.Node]
    storages_kept_out: frozenset[Hashable] = frozenset()

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> _State:
        own = tensors_of(graph_module)
        norms = _norms(graph_module, own)
        names = {name for node in graph_module.graph.nodes if node not in norms for name in node.meta.get(WRITES, ())}
        tensors = frozenset(id(own[name]) for name in names if name in own)
        reads = [node for node in graph_module.graph.find_nodes(op="get_attr") if id(own.get(node.target)) in tensors]
        return cls(graph_module, tensors, frozenset(map(_storage, reads)) - {None}, norms)

    def is_touched_by(self, node: fx.Node) -> bool:
        """Whether a node writes into state, or reads any that is written into."""
        if node in self.norms:
            return _storage(node) in self.storages_kept_out
        if WRITES in node.meta or _storage(node) in self.storages_kept_out:
            return True
        if any(_storage(operand) in self.storages for operand in node.all_input_nodes):
            return True
        if node.op != "call_module":
            return False
        module = self.graph_module.get_submodule(str(node.target))
        return any(map(_updates_state, module.modules())) or any(
            id(tensor) in self.tensors for tensor in tensors_of(module).values()
        )


def _norms(graph_module: fx.GraphModule, own: Mapping[str, torch.Tensor]) -> frozenset[fx.Node]:
    """Return the calls of batch norms whose running statistics no other node reads or writes."""
    users: dict[int, set[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        for name in filter(own.__contains__, _state_of(node, graph_module)):
            users.setdefault(id(own[name]), set()).add(node)
    norms = (
        (node, graph_module.get_submodule(str(node.target))) for node in graph_module.graph.find_nodes(op="call_module")
    )
    return frozenset(
        node
        for node, module in norms
        if updates_statistics(module) and all(users[id(buffer)] == {node} for buffer in module.buffers())
    )


def _state_of(node: fx.Node, graph_module: fx.GraphModule) -> Iterator[str]:
    """Yield the names of the tensors of a graph module that a node reads or writes."""
    yield from node.meta.get(WRITES, ())
    if node.op == "call_module":
        yield from (f"{node.target}.{name}" for name in tensors_of(graph_module.get_submodule(str(node.target))))
    elif node.op == "get_attr":
        yield str(node.target)


def _storage(node: fx.Node) -> Hashable:
    value = node.meta.get("val")
    return private.storage_key(value) if isinstance(value, torch.Tensor) else None


def _written_across(graph_module: fx.GraphModule, parts: Sequence[Sequence[fx.Node]]) -> frozenset[Hashable]:
    """Return memory that one node writes into, another reads later, and not all views of it are of one region.

    What leaves a region is a tensor of its own, whatever it was a view of.
    """
    part_of = {node: index for index, part in enumerate(parts) for node in part}
    views: dict[Hashable, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if (storage := _storage(node)) is not None:
            views.setdefault(storage, []).append(node)
    found = set()
    for node in graph_module.graph.nodes:
        operand = written_operand(node, graph_module)
        if operand is None or not is_read_again(node, operand):
            continue
        sharing = views.get(_storage(operand), [])
        if len({part_of.get(view) for view in (*sharing, node)}) > 1 and len(sharing) > 1:
            found.add(_storage(operand))
    return frozenset(found)


def _can_join(node: fx.Node, state: _State) -> bool:
    values = [node, *(operand for operand in node.all_input_nodes if not _floats(operand))]
    if not all(isinstance(value.meta.get("val"), torch.Tensor) or _is_tuple_of_tensors(value) for value in values):
        return False
    if node.op == "call_module" and not _can_run_again(state.graph_module.get_submodule(str(node.target))):
        return False
    reason = node.meta.get(STAYS_OUTSIDE)
    # A region writes a norm's statistics for it, and does nothing else that a norm may have been given to do.
    return (reason is None or (node in state.norms and reason.startswith(CHANGES))) and not state.is_touched_by(node)


def _draws_by_itself(module: nn.Module) -> bool:
    """Whether a module draws dropout masks in an order that tracing does not follow: between recurrent layers."""
    return isinstance(module, nn.RNNBase) and module.num_layers > 1 and module.dropout > 0 and module.training


def _is_tuple_of_tensors(node: object) -> TypeGuard[fx.Node]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, (tuple, list)) and all(isinstance(item, torch.Tensor) for item in value)


def _can_run_again(module: nn.Module) -> bool:
    """Whether running the module twice draws the same masks, and not running it calls no hook too few."""
    return not any(map(_draws_by_itself, module.modules())) and not hooked_inside(module)


def _updates_state(module: nn.Module) -> bool:
    """Whether running the module twice would change a buffer twice; its mode may have changed since the capture."""
    return bool(getattr(module, "track_running_stats", False)) and module.training


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
