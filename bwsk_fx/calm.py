"""CALM analysis: which parts of a torch-level graph run shard by shard along each axis, without coordination.

Claims on one axis form a graph of their own. A coordination point (a BARRIER or REDUCE on the axis) starts a new
stage for all that depends on it; connected claims of one stage are a partition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx.arguments import require_graph
from bwsk_fx.axes import Step, follow_axes
from bwsk_fx.blocks import block_of
from bwsk_fx.calm_backward import Backward, gradient_reduces
from bwsk_fx.calm_choices import sharding_problem
from bwsk_fx.calm_cost import Operation, Trials, operations
from bwsk_fx.calm_order import Order, node_graph, order_of
from bwsk_fx.report.calm import AxisFact, AxisReport, CalmReport, Coordination, NodeReport, behaviour_counts, strictest
from bwsk_fx.rules.axis import Behaviour, Claim
from bwsk_fx.rules.axis_table import Axis, AxisTable, tensor_bytes
from bwsk_fx.verdict import Verdict


def analyze_calm(graph: fx.GraphModule) -> CalmReport:
    """Report, for each axis of a captured graph, what runs without coordination.

    Args:
        graph: A graph from `bwsk_fx.capture`, fused or not, with `meta["val"]` on every node.

    Returns:
        The partitions, barriers and reductions of each axis; `to_json()` for machines, printable for people.

    Raises:
        RuleError: A node has no value to read its sizes from.
    """
    require_graph(graph)
    return Analysis.of(graph).report()


@dataclass(frozen=True)
class Analysis:
    """The claims of a graph, and the axes that they are about.

    Attributes:
        steps: Every node with its claims, in order, regions opened.
        axes: The axes.
        operations: The steps with their weights and the origins of their operands.
    """

    steps: tuple[Step, ...]
    axes: AxisTable
    operations: tuple[Operation, ...]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Analysis:
        """Analyse a captured graph."""
        steps, axes = follow_axes(graph)
        return cls(steps, axes, operations(graph, steps))

    @cached_property
    def trials(self) -> Trials:
        """What runs single nodes on tensors without numbers."""
        return Trials(self.axes)

    @cached_property
    def backward(self) -> Backward:
        """The backward passes."""
        return Backward(self.operations, self.axes, self.trials)

    @cached_property
    def order(self) -> Order:
        """The partial order of the nodes."""
        return order_of(node_graph(self.operations, self.trials))

    def facts(self, step: Step) -> tuple[AxisFact, ...]:
        """Return what a step does on each axis that has a name."""
        facts = (
            AxisFact(name, claim.behaviour, claim.reason, claim.role, _moved(step, claim, self.axes))
            for claim in step.claims
            if (name := self.axes.name(claim.axis))
        )
        return tuple(dict.fromkeys(facts))

    def report(self) -> CalmReport:
        """Return the report."""
        reports = [
            NodeReport(
                step.node.name,
                step.target,
                self.facts(step),
                self.backward.facts(operation),
                block_of(step.node) or "",
            )
            for step, operation in zip(self.steps, self.operations, strict=True)
        ]
        nodes = tuple(report for report in reports if report.facts)
        partitions = self._partitions()
        names = dict.fromkeys(fact.axis for report in nodes for fact in report.facts)
        axes = tuple(_axis_report(name, nodes, partitions.get(name, [])) for name in names)
        unknown = tuple(step.node.name for step in self.steps if step.unknown)
        problem = sharding_problem(self.operations, self.backward)
        return CalmReport(axes, nodes, unknown, _published_score(self.steps), self.order, problem)

    @cached_property
    def _families(self) -> Mapping[Axis, Axis]:
        """The first of all axes of one name that have the same facts under different indices, per axis."""
        graph = nx.Graph()
        for axis in {claim.axis for step in self.steps for claim in step.claims}:
            graph.add_node(axis)
            graph.add_edges_from(
                (axis, origin) for origin in self.axes.origins(axis) if self.axes.name(origin) == self.axes.name(axis)
            )
        return {axis: min(family) for family in nx.connected_components(graph) for axis in family}

    def _partitions(self) -> dict[str, list[tuple[str, ...]]]:
        carriers: dict[Axis, dict[int, list[Claim]]] = defaultdict(lambda: defaultdict(list))
        for index, step in enumerate(self.steps):
            for claim in step.claims:
                carriers[self._families[claim.axis]][index].append(claim)
        found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for axis, said in carriers.items():
            if name := self.axes.name(axis):
                found[name] += _Stages(self.steps, said).partitions()
        return {
            name: [tuple(self.steps[index].node.name for index in part) for part in sorted(parts)]
            for name, parts in found.items()
        }


@dataclass(frozen=True)
class _Stages:
    """One axis: its claims by step, and how they fall into stages between coordination points."""

    steps: Sequence[Step]
    said: Mapping[int, Sequence[Claim]]

    def partitions(self) -> list[tuple[int, ...]]:
        """Return the connected groups of each stage that map anything, as steps in order."""
        groups = nx.connected_components(self._graph())
        return [tuple(sorted({index for index, _ in group})) for group in groups if any(map(self._maps, group))]

    def _graph(self) -> nx.Graph:
        """Connect what is in one stage. A step that reduces is in two: it closes one and may open the next."""
        graph = nx.Graph()
        after: dict[int, int] = {}
        positions: dict[fx.Node, int] = {}
        for index in range(min(self.said), max(self.said) + 1):
            step, claims = self.steps[index], self.said.get(index, ())
            sources = [positions[value.node] for value in step.inputs if value.node in positions]
            stage = max((after[source] for source in sources), default=0)
            waits = any(not claim.behaviour.coordination_free for claim in claims)
            after[index] = stage + waits
            positions[step.node] = index
            if all(claim.behaviour is not Behaviour.BARRIER for claim in claims):
                graph.add_nodes_from((index, after[index]) for claim in claims if claim.produced)
                graph.add_nodes_from((index, stage) for claim in claims if claim.consumed)
                self._connect(graph, sources, (index, stage))
        return graph

    def _connect(self, graph: nx.Graph, sources: Sequence[int], vertex: tuple[int, int]) -> None:
        index, stage = vertex
        if any(claim.consumed for claim in self.said.get(index, ())):
            graph.add_edges_from(((source, stage), vertex) for source in sources if (source, stage) in graph)

    def _maps(self, vertex: tuple[int, int]) -> bool:
        return any(claim.behaviour.coordination_free for claim in self.said[vertex[0]])


def _moved(step: Step, claim: Claim, axes: AxisTable) -> int:
    if claim.behaviour.coordination_free:
        return 0
    if claim.moved is not None:
        return claim.moved
    if claim.behaviour is Behaviour.REDUCE:
        return sum(map(tensor_bytes, pytree.tree_leaves(step.node.meta["val"])))
    return sum(value.bytes_per_sample for value in step.inputs if axes.overlap([claim.axis], value.layout))


def _axis_report(name: str, nodes: Sequence[NodeReport], partitions: list[tuple[str, ...]]) -> AxisReport:
    carrying = [(node, behaviour) for node in nodes if (behaviour := strictest(node.facts).get(name))]
    return AxisReport(
        name,
        len(carrying),
        behaviour_counts([behaviour for _, behaviour in carrying]),
        tuple(partitions),
        tuple(_points(name, carrying, Behaviour.BARRIER)),
        tuple(_points(name, carrying, Behaviour.REDUCE)),
        behaviour_counts([behaviour for node in nodes if (behaviour := strictest(node.backward).get(name))]),
        gradient_reduces([(node.node, fact) for node in nodes for fact in node.backward], name),
    )


def _points(
    name: str, carrying: Sequence[tuple[NodeReport, Behaviour]], behaviour: Behaviour
) -> Iterator[Coordination]:
    for node, strictest_behaviour in carrying:
        if strictest_behaviour is behaviour:
            facts = [fact for fact in node.facts if fact.axis == name and fact.behaviour is behaviour]
            moved = sum(fact.bytes_per_sample for fact in facts)
            yield Coordination(node.node, node.target, behaviour, facts[0].reason, moved)


def _published_score(steps: Sequence[Step]) -> float | None:
    """The S-ratio, where the `published` ruleset labelled the graph; other rulesets say nothing about CALM."""
    verdicts = [step.node.meta.get("bwsk") for step in steps]
    labels = [str(verdict.label) for verdict in verdicts if verdict is not None and _counts(verdict)]
    return labels.count("S") / len(labels) if labels else None


def _counts(verdict: Verdict) -> bool:
    return verdict.counted and verdict.ruleset == "published"
