"""The partial order of a graph's nodes on one device: critical path, width, and what runs side by side.

Nodes are those that compute from inputs; what follows from parameters and constants alone is at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import fx

from bwsk_fx.calm_cost import Operation, Trials


@dataclass(frozen=True)
class Branch:
    """Nodes that need nothing of the other branches between the same fork and join.

    Attributes:
        nodes: The nodes, in order.
        flops: Their floating-point operations, for one sample of the batch.
        bytes: What they read and write, for one sample of the batch.
    """

    nodes: tuple[str, ...]
    flops: int
    bytes: int


@dataclass(frozen=True)
class Fork:
    """Branches that can run side by side.

    Attributes:
        after: The nodes outside that the branches start from; empty where they start from inputs.
        join: The node that needs all of them.
        branches: The branches.
    """

    after: tuple[str, ...]
    join: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Order:
    """What the partial order of the nodes allows on one device, for one sample of the batch.

    Attributes:
        nodes: How many nodes there are.
        flops: All floating-point operations of products, forward.
        bytes: What all nodes read and write.
        critical_path: The chain of nodes with the most FLOPs (of those, the most bytes).
        critical_flops: Its FLOPs; no number of parallel units takes fewer one after the other.
        width: The most nodes that are pairwise independent (the maximum antichain).
        widest: Such nodes.
        forks: What runs side by side, in the order of the joins.
        unmeasured: Nodes that do not run on fake tensors, whose FLOPs are counted as 0.
    """

    nodes: int
    flops: int
    bytes: int
    critical_path: tuple[str, ...]
    critical_flops: int
    width: int
    widest: tuple[str, ...]
    forks: tuple[Fork, ...]
    unmeasured: tuple[str, ...]

    @property
    def parallelism(self) -> float:
        """All FLOPs over those of the critical path: no device can gain more by running nodes side by side."""
        return self.flops / self.critical_flops if self.critical_flops else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the order as JSON-ready dictionaries."""
        return asdict(self) | {"parallelism": self.parallelism}


def node_graph(operations: Sequence[Operation], trials: Trials) -> nx.DiGraph:
    """Return the nodes that compute from inputs as a DAG of operation indices.

    Edges lead from producers to consumers, and around a node that writes into an operand: earlier readers before it,
    later ones after it.

    Returns:
        A graph whose nodes have `name`, `flops` and `bytes` (for one sample of the batch), and `known`.
    """
    graph = nx.DiGraph()
    users: dict[fx.Node, list[int]] = {}
    for operation in operations:
        if operation.static or operation.is_input:
            continue
        cost = trials.cost(operation)
        flops, moved = cost.flops.at(1), cost.bytes.at(1)
        graph.add_node(operation.index, name=operation.name, flops=flops, bytes=moved, known=cost.known)
        sources = {source for source, _ in operation.sources if source in graph}
        for place, value in enumerate(operation.step.inputs):
            known = users.setdefault(value.node, [])
            if place == 0 and _writes(operation):
                sources.update(known)
                users[value.node] = [operation.index]
            else:
                sources.update(user for user in known[:1] if _writes(operations[user]))
                known.append(operation.index)
        graph.add_edges_from((source, operation.index) for source in sources if source != operation.index)
    return graph


def _writes(operation: Operation) -> bool:
    """Whether a node writes into its first operand."""
    name = getattr(operation.step.node.target, "__name__", str(operation.step.node.target))
    in_place = operation.step.node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    return in_place or name in ("setitem", "__setitem__")


def order_of(graph: nx.DiGraph) -> Order:
    """Return what the partial order of a `node_graph` allows."""
    names, path = nx.get_node_attributes(graph, "name"), critical_path(graph)
    widest = maximum_antichain(graph)
    return Order(
        len(graph),
        sum(flops for _, flops in graph.nodes("flops")),
        sum(moved for _, moved in graph.nodes("bytes")),
        tuple(names[node] for node in path),
        sum(graph.nodes[node]["flops"] for node in path),
        len(widest),
        tuple(names[node] for node in widest),
        tuple(_Forks(graph).all()),
        tuple(names[node] for node, known in graph.nodes("known") if not known),
    )


def critical_path(graph: nx.DiGraph) -> list[int]:
    """Return the chain of nodes with the most FLOPs, and of those with the most bytes."""
    best: dict[int, tuple[int, int]] = {}
    before: dict[int, int] = {}
    for node in sorted(graph):
        flops, moved = 0, 0
        if sources := list(graph.predecessors(node)):
            before[node] = max(sources, key=best.__getitem__)
            flops, moved = best[before[node]]
        best[node] = (flops + graph.nodes[node]["flops"], moved + graph.nodes[node]["bytes"])
    return _followed(max(best, key=best.__getitem__), before)[::-1] if best else []


def _followed(node: int, links: Mapping[int, int]) -> list[int]:
    """Return a node and those that links lead to, one after the other."""
    chain = [node]
    while node in links:
        node = links[node]
        chain.append(node)
    return chain


# -- width ------------------------------------------------------------------------------------------------------------


def maximum_antichain(graph: nx.DiGraph) -> list[int]:
    """Return the most nodes of a DAG that are pairwise independent.

    By Dilworth's theorem they are as many as the chains that cover all nodes. Chains may share nodes, so that the
    edges of the DAG do and its transitive closure is not needed: a flow with at least one unit through each node is
    made least. It starts from few chains and each augmentation takes one away, so that the time is proportional to the
    edges times the width (times a logarithm).
    """
    flow = _Flow(graph, _covering_chains(graph))
    while flow.reduce():
        pass
    return flow.cut()


def _covering_chains(graph: nx.DiGraph) -> list[list[int]]:
    """Return chains that cover all nodes, each with as many new ones as can be."""
    order, chains = sorted(graph, reverse=True), []
    missing = set(order)
    while missing:
        gain: dict[int, int] = {}
        after: dict[int, int] = {}
        for node in order:
            gain[node] = node in missing
            if targets := list(graph.successors(node)):
                after[node] = max(targets, key=gain.__getitem__)
                gain[node] += gain[after[node]]
        chain = _followed(max(gain, key=gain.__getitem__), after)
        missing.difference_update(chain)
        chains.append(chain)
    return chains


class _Flow:
    """Chains as a flow from a source into every node's entry, through the node, from its exit to a sink.

    Vertices of the residual graph are (node, 0) for entries and (node, 1) for exits.
    """

    def __init__(self, graph: nx.DiGraph, chains: Iterable[Sequence[int]]) -> None:
        self._graph = graph
        self._through = dict.fromkeys(graph, 0)
        self._along = dict.fromkeys(graph.edges, 0)
        self._starts, self._ends = dict.fromkeys(graph, 0), dict.fromkeys(graph, 0)
        for chain in chains:
            self._starts[chain[0]] += 1
            self._ends[chain[-1]] += 1
            for node in chain:
                self._through[node] += 1
            for edge in pairwise(chain):
                self._along[edge] += 1

    def reduce(self) -> bool:
        """Take one unit away; False where every chain is needed."""
        before = self._search()
        last = next((node for node in self._ends if self._ends[node] and (node, 1) in before), None)
        if last is None:
            return False
        self._ends[last] -= 1
        vertex: tuple[int, int] = (last, 1)
        while (origin := before[vertex]) is not None:
            self._move(origin, vertex)
            vertex = origin
        self._starts[vertex[0]] -= 1
        return True

    def cut(self) -> list[int]:
        """Return the nodes whose one unit nothing can replace, once `reduce` is False: an antichain."""
        reached = self._search()
        return [node for node in sorted(self._graph) if (node, 0) in reached and (node, 1) not in reached]

    def _search(self) -> dict[tuple[int, int], tuple[int, int] | None]:
        """Return the vertices from which a unit that is taken at the source can be taken on, each with its origin.

        Taking a unit at the start of a chain leaves its entry short of one, which the node itself can do without where
        two go through, or which another way into it can make up for.
        """
        waiting = [(node, 0) for node in self._graph if self._starts[node]]
        before: dict[tuple[int, int], tuple[int, int] | None] = dict.fromkeys(waiting)
        while waiting:
            vertex = waiting.pop()
            for reached in self._residual(vertex):
                if reached not in before:
                    before[reached] = vertex
                    waiting.append(reached)
        return before

    def _residual(self, vertex: tuple[int, int]) -> Iterator[tuple[int, int]]:
        node, is_exit = vertex
        if is_exit:
            yield from ((after, 0) for after in self._graph.successors(node) if self._along[node, after])
            yield (node, 0)
        else:
            yield from ((earlier, 1) for earlier in self._graph.predecessors(node))
            if self._through[node] > 1:
                yield (node, 1)

    def _move(self, origin: tuple[int, int], vertex: tuple[int, int]) -> None:
        (node, is_exit), (other, _) = origin, vertex
        if node == other:
            self._through[node] += 1 if is_exit else -1
        elif is_exit:
            self._along[node, other] -= 1
        else:
            self._along[other, node] += 1


# -- what runs side by side -------------------------------------------------------------------------------------------


class _Forks:
    """Finds, for each join, the branches that end in it.

    From the join backwards, nodes are taken until one is met that precedes all that was taken, and that all the rest
    precedes: nothing from there on runs beside what was taken. Connected parts of what was taken are the branches.
    Where that is one part only, the second condition alone stops the walk (the keys of a decoder's later layers start
    from the encoder and have a long way to run beside, which is no branch of the join).
    """

    def __init__(self, graph: nx.DiGraph) -> None:
        self._graph = graph
        # Ancestors as bits of one integer each: unions and differences are a few machine words.
        self._ancestors: dict[int, int] = {}
        for node in sorted(graph):
            bits = 0
            for source in graph.predecessors(node):
                bits |= self._ancestors[source] | 1 << source
            self._ancestors[node] = bits

    def all(self) -> Iterator[Fork]:
        """Yield the forks in the order of their joins; one that only lengthens another is merged with it."""
        found: dict[int, list[tuple[frozenset[int], list[frozenset[int]]]]] = {}
        for join in sorted(self._graph):
            found[join] = list(self._of(join, self._graph.predecessors(join)))
            for place, (after, branches) in enumerate(found[join]):
                found[join][place] = (after, list(self._opened(after, branches, found)))
        for join, forks in found.items():
            yield from (self._fork(join, after, branches) for after, branches in forks)

    def _of(self, join: int, ends: Iterable[int]) -> Iterator[tuple[frozenset[int], list[frozenset[int]]]]:
        """Yield the branches of a join, then those inside of one branch that end in the join, too."""
        ends = list(ends)
        if len(ends) < 2:
            return
        parts = self._parts(ends, strict=True) or self._parts(ends, strict=False)
        if parts:
            yield self._outside(frozenset().union(*parts)), parts
            for part in parts:
                yield from self._of(join, part.intersection(ends))

    def _parts(self, ends: Iterable[int], strict: bool) -> list[frozenset[int]]:
        region = self._region(ends, strict)
        parts = [frozenset(part) for part in nx.weakly_connected_components(self._graph.subgraph(region))]
        return sorted(parts, key=min) if len(parts) > 1 else []

    def _region(self, ends: Iterable[int], strict: bool) -> set[int]:
        frontier, region = set(ends), set()
        common = -1  # what precedes all that was taken, as bits
        while frontier:
            last = max(frontier)
            rest = sum(1 << node for node in frontier if node != last)
            if not rest & ~self._ancestors[last] and (not strict or common >> last & 1):
                break
            frontier.remove(last)
            region.add(last)
            common &= self._ancestors[last]
            frontier.update(self._graph.predecessors(last))
        return region

    def _outside(self, region: Collection[int]) -> frozenset[int]:
        return frozenset(source for node in region for source in self._graph.predecessors(node)) - frozenset(region)

    def _opened(
        self,
        after: frozenset[int],
        branches: Iterable[frozenset[int]],
        found: dict[int, list[tuple[frozenset[int], list[frozenset[int]]]]],
    ) -> Iterator[frozenset[int]]:
        """Yield branches; in place of one that ends in a join of branches from the same fork, those branches."""
        for branch in branches:
            inner = found.get(max(branch), [])
            place = next((place for place, (start, _) in enumerate(inner) if start == after), None)
            if place is None:
                yield branch
            else:
                yield from inner.pop(place)[1]

    def _fork(self, join: int, after: Collection[int], branches: Iterable[Collection[int]]) -> Fork:
        names: Mapping[int, str] = dict(self._graph.nodes("name"))
        return Fork(tuple(names[node] for node in sorted(after)), names[join], tuple(map(self._branch, branches)))

    def _branch(self, nodes: Collection[int]) -> Branch:
        facts = [self._graph.nodes[node] for node in sorted(nodes)]
        flops, moved = (sum(fact[key] for fact in facts) for key in ("flops", "bytes"))
        return Branch(tuple(fact["name"] for fact in facts), flops, moved)
