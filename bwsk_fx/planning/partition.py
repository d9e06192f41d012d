"""Plan to code: one joint graph becomes a forward and a backward GraphModule.

The forward module returns the region's outputs and what the plan keeps. The backward module takes one list, which it
empties, of the kept values, the static values that it reads and the tangents; it rebuilds every other value as late
as possible, once, and frees each after its last use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.planning.derivations import Derivation, Hypergraph
from bwsk_fx.planning.joint import JointGraph, is_constant, is_random, nbytes
from bwsk_fx.planning.kernels import fill_in_values
from bwsk_fx.planning.liveness import peak_bytes
from bwsk_fx.planning.simplify import forget_state_updates
from bwsk_fx.planning.sizes import bind_sizes, is_symbolic, symbolic_numbers_of, symbols_of
from bwsk_fx.planning.solve import Solution
from bwsk_fx.planning.views import base_of
from bwsk_fx.rules.inverse import laid_out

aten = torch.ops.aten


@dataclass(frozen=True)
class Partition:
    """The two halves of a planned joint graph.

    Attributes:
        forward: Takes the primals; returns `(outputs, kept)`, two tuples.
        backward: Takes one list `[*kept, *static, *tangents]`, empties it, and returns one gradient or None per
            primal.
        static: Indices of the static primals that the backward module reads; sizes come last.
        forward_peak: The most bytes that the forward module holds at a time, parameters excluded.
        backward_peak: The same of the backward module, with what is kept.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    static: tuple[int, ...]
    forward_peak: int
    backward_peak: int


def partition(joint: JointGraph, hypergraph: Hypergraph, solution: Solution, *, exact: bool = False) -> Partition:
    """Write the forward and the backward module of a plan.

    Args:
        joint: The planned graph.
        hypergraph: The ways to its values.
        solution: What is kept, and which ways are taken.
        exact: Give the backward pass every kept value in its own layout, since kernels may round otherwise in another.

    Raises:
        PlanError: The plan leaves a value without a derivation.
    """
    writer = _BackwardWriter(joint, hypergraph, solution, exact)
    backward = writer.write()
    forward = _write_forward(joint, solution.kept)
    fill_in_values([*forward.nodes, *backward.nodes])
    peaks = (_peak(forward, joint.static_primals), _peak(backward, joint.at_hand))
    modules = _module(forward, "RegionForward"), _module(backward, "RegionBackward")
    return Partition(*modules, writer.static_indices(), *peaks)


def _peak(graph: fx.Graph, own: Iterable[fx.Node]) -> int:
    names = {primal.name for primal in own}
    return peak_bytes(graph, [node for node in graph.nodes if node.name in names])


def _module(graph: fx.Graph, name: str) -> fx.GraphModule:
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph, class_name=name)


def _write_forward(joint: JointGraph, kept: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    outputs = [output for output in joint.forward_outputs if isinstance(output, fx.Node)]
    wanted = _ancestors([*outputs, *kept, *(node for node in joint.forward_nodes() if is_random(node))])
    for node in joint.graph.nodes:
        if node in joint.primals or (node in wanted and node.op == "call_function"):
            at[node] = graph.node_copy(node, at.__getitem__)
    saved = tuple(
        graph.call_function(aten.clone.default, (at[node],)) if is_kept_as_copy(joint, node, kept) else at[node]
        for node in kept
    )
    returned = [at[output] if isinstance(output, fx.Node) else output for output in joint.forward_outputs]
    graph.output((_distinct(graph, returned), saved))
    bind_sizes(graph, symbols_of(graph.find_nodes(op="placeholder")))
    return graph


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def is_kept_as_copy(joint: JointGraph, node: fx.Node, kept: Sequence[fx.Node]) -> bool:
    """Whether a kept value needs memory of its own.

    What it is a view of may be about to change, or not all of it is kept, and it would keep it alive.
    """
    base = base_of(node)
    return base in joint.rewritten or nbytes(base) > sum(nbytes(other) for other in kept if base_of(other) is base)


def _symbols_in_sizes(graph: fx.Graph) -> set[Any]:
    """Return the symbols in the recorded sizes and strides of tensors."""
    tensors = (node for node in graph.nodes if not is_symbolic(node.meta.get("val")))
    numbers = (number for node in tensors for number in symbolic_numbers_of(node))
    return {symbol for number in numbers for symbol in private.symbols_in(number)}


def _distinct(graph: fx.Graph, outputs: Sequence[Any]) -> tuple[Any, ...]:
    """Give every output a tensor object of its own: autograd tells the outputs of a Function apart by it."""
    seen: set[fx.Node] = set()
    result = []
    for output in outputs:
        repeated = isinstance(output, fx.Node) and output in seen
        result.append(graph.call_function(aten.alias.default, (output,)) if repeated else output)
        seen |= {output} if isinstance(output, fx.Node) else set()
    return tuple(result)


class _BackwardWriter:
    """Copies the nodes that depend on tangents, and derives what they read on demand."""

    def __init__(self, joint: JointGraph, hypergraph: Hypergraph, solution: Solution, exact: bool) -> None:
        self._joint = joint
        self._hypergraph = hypergraph
        self._graph = fx.Graph()
        self._at: dict[fx.Node, fx.Node] = {}
        self._chosen = {hypergraph.class_of[one.head]: one for one in solution.used}
        self._views: dict[fx.Node, list[Derivation]] = {}
        for view in hypergraph.views:
            self._views.setdefault(view.head, []).append(view)
        # Numbers come behind tensors.
        self._static = sorted(
            (index for index, primal in enumerate(joint.primals) if primal in joint.at_hand),
            key=lambda index: is_symbolic(joint.primals[index].meta.get("val")),
        )
        self._take_inputs(solution.kept)
        if exact:
            self._lay_out_copies(solution.kept)

    def write(self) -> fx.Graph:
        """Return the graph of the backward module."""
        for node in self._joint.graph.nodes:
            if node in self._joint.backward and node.op == "call_function":
                for operand in node.all_input_nodes:
                    self._obtain(operand)
                self._at[node] = self._copy(node)
        gradients = [None if gradient is None else self._obtain(gradient) for gradient in self._joint.gradients]
        self._graph.output(tuple(gradients))
        forget_state_updates(self._graph)
        bind_sizes(self._graph, symbols_of(self._graph.find_nodes(op="call_method", target="pop")))
        self._drop_unread_static()
        return self._graph

    def static_indices(self) -> tuple[int, ...]:
        """Return which static primals the written graph reads."""
        return tuple(self._static)

    def _take_inputs(self, kept: Sequence[fx.Node]) -> None:
        box = self._graph.placeholder("residuals")
        static = [self._joint.primals[index] for index in self._static]
        for node in (*kept, *static, *self._joint.tangents):
            # The list must not hold what the code has finished with, so each tensor is taken out of it.
            taken = self._graph.create_node("call_method", "pop", (box, 0), name=node.name)
            taken.meta = dict(node.meta)
            self._at[node] = taken

    def _lay_out_copies(self, kept: Sequence[fx.Node]) -> None:
        for node in kept:
            if is_kept_as_copy(self._joint, node, kept) and not node.meta["val"].is_contiguous():
                copied = self._graph.call_function(laid_out, (self._at[node], node.meta["val"].stride()))
                copied.meta = dict(node.meta)
                self._at[node] = copied

    def _drop_unread_static(self) -> None:
        sizes = _symbols_in_sizes(self._graph)
        for index in list(self._static):
            taken = self._at[self._joint.primals[index]]
            # Whoever checks the layouts of a run has to know the symbols in them.
            if not taken.users and not symbols_of([taken]).keys() & sizes:
                self._static.remove(index)
                self._graph.erase_node(taken)

    def _copy(self, node: fx.Node) -> fx.Node:
        return self._graph.node_copy(node, lambda operand: self._at[operand])

    def _obtain(self, value: fx.Node) -> fx.Node:
        """Return the node that holds `value`, deriving it first where it is not there yet."""
        if value in self._at:
            return self._at[value]
        if is_constant(value):
            self._at[value] = value.meta["val"]
            return self._at[value]
        self._obtain_class(self._hypergraph.class_of[value])
        for view in self._path_to(value):
            self._emit(view)
        return self._at[value]

    def _obtain_class(self, cls: fx.Node) -> None:
        """Make sure that some member of a class of views is there."""
        if any(member in self._at for member in self._members(cls)):
            return
        if cls not in self._chosen:
            raise PlanError(f"the plan has no way to obtain {cls.name} ({cls.target}) in the backward pass")
        one = self._chosen[cls]
        for tail in one.tails:
            self._obtain(tail)
        self._emit(one)

    def _members(self, cls: fx.Node) -> Iterable[fx.Node]:
        return (value for value, first in self._hypergraph.class_of.items() if first is cls)

    def _path_to(self, value: fx.Node) -> list[Derivation]:
        """Find the shortest chain of views from a member that is there to `value`, breadth first."""
        queue: deque[tuple[fx.Node, list[Derivation]]] = deque([(value, [])])
        seen = {value}
        while queue:
            current, path = queue.popleft()
            if current in self._at:
                return path
            for view in self._views.get(current, []):
                if view.tails[0] not in seen:
                    seen.add(view.tails[0])
                    queue.append((view.tails[0], [view, *path]))
        raise PlanError(f"no chain of views leads to {value.name} ({value.target})")

    def _emit(self, one: Derivation) -> None:
        node = one.emit(self._graph, [self._at[tail] for tail in one.tails])
        node.meta.setdefault("val", one.head.meta.get("val"))
        node.meta["derived_by"] = one.rule
        self._at[one.head] = node
