"""Which modules a device can hold a part of: pairs along one axis, read off the axis claims of a graph.

A Linear whose out-feature axis is carried shard by shard to another Linear that sums over it forms a pair: the first
holds some of its outputs, the second the inputs that belong to them, and what lies between needs no other device. Heads
are such shards: the out-feature axis of a query projection is a bundle of head x feature, attention maps heads, and the
output projection sums over the same bundle. An embedding can be the first of a pair, too. No name of a module or a
model is read anywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
from torch import fx, nn

from bwsk_fx.axes import Step
from bwsk_fx.calm import Analysis
from bwsk_fx.rules.axis import Behaviour, Value
from bwsk_fx.rules.axis_table import Axis, Extent
from bwsk_fx.signature import tensors_of


@dataclass(frozen=True)
class Group:
    """Linears that are sharded together.

    Attributes:
        columns: Paths of the Linears and embeddings that hold a share of their outputs.
        rows: Paths of the Linears that hold a share of their inputs, and whose partial results are summed.
        axis: The name of the axis that is shared out.
        size: How many whole units it has: heads, or features.
        dims: Every node that sees a shard instead of the whole, with the dimension of its result that is shared out:
            columns, and what lies between them and the rows.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    axis: str
    size: int
    dims: Mapping[fx.Node, int] = field(repr=False)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that see a shard, in graph order."""
        return tuple(self.dims)


def groups_of(analysis: Analysis) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Find all groups of a graph.

    Returns:
        The groups, in graph order, and why every other module with a matrix is in none, by path.
    """
    return _Search(analysis).result()


@dataclass
class _Flow:
    """What becomes of a module's outputs when they are sharded.

    Attributes:
        start: The module.
        axis: The axis that is sharded: the outermost of those that its outputs are made of.
        size: How many units it has.
        nodes: The nodes that see a shard, with the dimension of their results that is sharded.
        rows: The Linears at which the shards are summed.
        needs: Operands on the way that would have to be sharded too.
        refusal: Why it cannot be; empty where it can.
    """

    start: Step
    axis: Axis
    size: Extent
    nodes: dict[fx.Node, int] = field(default_factory=dict)
    rows: dict[fx.Node, None] = field(default_factory=dict)
    needs: set[fx.Node] = field(default_factory=set)
    refusal: str = ""


class _Search:
    def __init__(self, analysis: Analysis) -> None:
        self._axes = analysis.axes
        self._all = analysis.steps
        self._steps = {step.node: step for step in analysis.steps}
        self._order = {node: index for index, node in enumerate(self._steps)}
        self._users: dict[fx.Node, list[Step]] = {}
        for step in analysis.steps:
            for node in dict.fromkeys(value.node for value in step.inputs):
                self._users.setdefault(node, []).append(step)

    def result(self) -> tuple[tuple[Group, ...], dict[str, str]]:
        flows = [self._follow(step) for step in self._steps.values() if can_be_column(step.node)]
        reasons = dict(self._other_modules())
        reasons |= {path_of(flow.start.node): flow.refusal for flow in flows if flow.refusal}
        accepted: list[Group] = []
        taken: set[str] = set()
        for members in self._together([flow for flow in flows if not flow.refusal]):
            group = self._group(members)
            reason = self._conflict(members, group, taken)
            if reason:
                reasons |= dict.fromkeys(group.columns, reason)
            else:
                accepted.append(group)
                taken |= {*group.columns, *group.rows}
        return tuple(accepted), {path: reason for path, reason in reasons.items() if path not in taken}

    def _other_modules(self) -> Iterator[tuple[str, str]]:
        for node in self._steps:
            if node.op == "call_module" and not can_be_column(node):
                module = module_of(node)
                if any(parameter.dim() > 1 for parameter in module.parameters()):
                    yield path_of(node), f"a {type(module).__name__} is none of the modules that styles can shard"

    def _follow(self, start: Step) -> _Flow:
        """Follow the outermost axis of a Linear's outputs until every shard has been summed, or cannot go on."""
        out = start.results[0]
        flow = _Flow(start, *self._outermost(out))
        flow.refusal = self._tied.get(path_of(start.node), "")
        waiting = [self._order[start.node]]
        while waiting and not flow.refusal:
            step = self._all[heapq.heappop(waiting)]
            if step.node in flow.nodes or step.node in flow.rows:
                continue
            self._take(flow, step)
            if step.node in flow.nodes:
                for user in self._users.get(step.node, ()):
                    heapq.heappush(waiting, self._order[user.node])
        if not flow.refusal and not flow.rows:
            flow.refusal = "its outputs reach no Linear that sums over them"
        return flow

    def _take(self, flow: _Flow, step: Step) -> None:
        """Put a step into the flow, as a row where it ends the flow."""
        if step is not flow.start:
            for value in step.inputs:
                if self._dim(flow.axis, value) is not None and value.node not in flow.nodes:
                    flow.needs.add(value.node)
            if self._is_row(flow, step):
                flow.rows[step.node] = None
                return
            flow.refusal = self._obstacle(flow, step)
        if any(user.op == "output" or isinstance(user.target, type) for user in step.node.users):
            flow.refusal = f"the model returns {step.node.name}, and would return a shard of it"
        dim = self._dim(flow.axis, step.results[0]) if not flow.refusal else None
        if dim is not None:
            flow.nodes[step.node] = dim

    def _is_row(self, flow: _Flow, step: Step) -> bool:
        if not is_linear(step.node):
            return False
        operand = step.inputs[0]
        return self._dim(flow.axis, operand) == operand.rank - 1

    def _obstacle(self, flow: _Flow, step: Step) -> str:
        """Return why a step cannot run on a shard of the axis; empty where it can."""
        touched = self._chains(flow.axis, (*step.inputs, *step.results))
        for claim in step.claims:
            if self._axes.find(claim.axis) in touched and claim.behaviour is not Behaviour.MAP:
                return f"{step.node.name} ({step.target}) is a {claim.behaviour} on its outputs: {claim.reason}"
        if step.unknown:
            return f"{step.node.name} ({step.target}) has no axis rule"
        dims = {self._dim(flow.axis, value) for value in step.results}
        if len(dims) != 1 or None in dims:
            return f"{step.node.name} ({step.target}) does not keep whole shards of its outputs together"
        if step.node.op == "call_module" and tensors_of(module_of(step.node)):
            return f"{step.node.name} ({step.target}) has parameters or buffers, which every shard would share"
        return ""

    def _together(self, flows: list[_Flow]) -> Iterator[list[_Flow]]:
        """Yield the flows that meet: at a node, at a row, or where one is an operand of the other."""
        graph = nx.Graph()
        graph.add_nodes_from(range(len(flows)))
        for index, flow in enumerate(flows):
            graph.add_edges_from((index, (node, "shard")) for node in (*flow.nodes, *flow.needs))
            graph.add_edges_from((index, (node, "sum")) for node in flow.rows)
        for component in nx.connected_components(graph):
            yield [flow for index, flow in enumerate(flows) if index in component]

    def _group(self, members: list[_Flow]) -> Group:
        nodes = {node: dim for flow in members for node, dim in flow.nodes.items()}
        first = members[0]
        return Group(
            tuple(dict.fromkeys(path_of(flow.start.node) for flow in members)),
            tuple(dict.fromkeys(path_of(node) for flow in members for node in flow.rows)),
            self._axes.name(first.axis) or "an axis",
            int(first.size),
            {node: nodes[node] for node in sorted(nodes, key=self._order.__getitem__)},
        )

    def _conflict(self, members: list[_Flow], group: Group, taken: set[str]) -> str:
        """Return why a group cannot be sharded as a whole."""
        unmet = {node for flow in members for node in flow.needs}.difference(group.nodes)
        if unmet:
            name = min(unmet, key=lambda node: self._order.get(node, -1)).name
            return f"its outputs meet {name} on the way, which has the same axis and is not sharded"
        if clash := taken.intersection((*group.columns, *group.rows)):
            return f"{min(clash)} is sharded along another axis already"
        if clash := set(group.columns).intersection(group.rows):
            return f"{min(clash)} would be sharded along inputs and outputs at once"
        ends = {node for flow in members for node in (flow.start.node, *flow.rows)}
        inside = {path_of(node) for node in ends}
        calls = {node for node in self._steps if node.op == "call_module" and path_of(node) in inside}
        if other := calls - ends:
            return f"{min(path_of(node) for node in other)} is also called where it cannot be sharded"
        return next((reason for path in group.rows if (reason := self._tied.get(path, ""))), "")

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        """Why a Linear has to stay whole because others read its weights, by path."""
        owners: dict[int, list[str]] = {}
        root = next(iter(self._steps)).graph.owning_module
        assert root is not None
        for name, parameter in root.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        read = {str(node.target) for node in self._steps if node.op == "get_attr"}
        why = "its weight is shared with {}"
        return {
            name.rpartition(".")[0]: why.format(", ".join(other for other in names if other != name) or "the graph")
            for names in owners.values()
            for name in names
            if len(names) > 1 or name in read
        }

    def _outermost(self, value: Value) -> tuple[Axis, Extent]:
        axis, size = value.layout[-1], value.shape[-1]
        if axis is None:
            return self._axes.new(), 1
        while parts := self._axes.parts(axis):
            axis, size = parts[0]
        return self._axes.find(axis), size

    def _dim(self, axis: Axis, value: Value) -> int | None:
        """Return the dimension of which contiguous parts are shards of an axis."""
        for dim, there in enumerate(value.layout):
            if there is not None and self._axes.find(axis) in self._chain(there):
                return dim
        return None

    def _chain(self, axis: Axis) -> list[Axis]:
        """Return an axis, the outermost that it is made of, and so on."""
        chain = [self._axes.find(axis)]
        while parts := self._axes.parts(chain[-1]):
            chain.append(self._axes.find(parts[0][0]))
        return chain

    def _chains(self, axis: Axis, values: Iterable[Value]) -> set[Axis]:
        own = self._axes.find(axis)
        chains = (self._chain(there) for value in values for there in value.layout if there is not None)
        return {link for chain in chains if own in chain for link in chain}


def can_be_column(node: fx.Node) -> bool:
    """Whether a node calls what can hold a share of its outputs: an `nn.Linear` or an `nn.Embedding`."""
    return is_linear(node) or (node.op == "call_module" and type(module_of(node)) is nn.Embedding)


def is_linear(node: fx.Node) -> bool:
    """Whether a node calls an `nn.Linear`, which can hold a share of its outputs, or of its inputs."""
    return node.op == "call_module" and type(module_of(node)) is nn.Linear


def path_of(node: fx.Node) -> str:
    """Return the path of the module that a node calls."""
    return str(node.target)


def module_of(node: fx.Node) -> nn.Module:
    """Return the module that a node calls."""
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(path_of(node))
