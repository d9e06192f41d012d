"""Queries on typed graphs: what a node's value determines of the inputs, and what is erased along the depth.

The walk back is about information, not about code that runs: a value determines an operand if the node's verdict says
that the operand can be rebuilt from it. What the verdict's inverse needs besides, its witness, is not determined; it
is added up along the way.
"""

from __future__ import annotations

import difflib
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, product
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.arguments import require_graph
from bwsk_fx.blocks import blocks, section_and_index
from bwsk_fx.errors import RuleError
from bwsk_fx.report.erasure import ErasureBudget, LayerErasure, NodeErasure
from bwsk_fx.report.nodes import source_line, verdict_of
from bwsk_fx.report.provenance import Cut, PathStep, Provenance, WayBack
from bwsk_fx.rules import sizes, sound
from bwsk_fx.rules.registry import Call, target_name
from bwsk_fx.verdict import NOTHING, Erasure, Label, WitnessKind


def trace_back(graph: fx.GraphModule, node: fx.Node | str) -> Provenance:
    """Follow a node back to the inputs that its value determines, and to the first K or GRAY node on each other way.

    A way goes from an S node to the operands that its verdict rebuilds: all operands of a `cat`, one of a sum. The
    other operand of a sum is the way's witness and is itself not determined; a way that leads to what its own
    witnesses determine is cut, since that would be no news. Of several ways to one node the one with the smallest
    witnesses counts.

    Args:
        graph: A graph from `type_nodes`.
        node: One of its nodes, or the name of one.

    Returns:
        The inputs reached, the ways with their S nodes and witnesses, and the cuts; printable, with `to_json()`.

    Raises:
        RuleError: The graph is not typed, or has no such node.
    """
    require_graph(graph)
    start = _find(graph, node)
    calls = calls_of(graph)
    ways = tuple(_Walk(calls).back_from(start))
    return Provenance(start.name, operator_of(calls[start]), verdict_of(start).label, ways)


def erasure_budget(graph: fx.GraphModule) -> ErasureBudget:
    """Add up what the counted K nodes of a typed graph erase per sample: per layer, and from the inputs to there.

    A layer is a repeated block, or outside of blocks the outermost module that holds no block (`vit.embeddings`,
    `classifier`). What the model's own forward method calls has the empty path.

    Returns:
        The layers in execution order; totals agree with `summarize`. Printable, with `to_json()`.

    Raises:
        RuleError: The graph is not typed.
    """
    require_graph(graph)
    calls = [call for call in calls_of(graph).values() if verdict_of(call.node).counted]
    above = _above_blocks(graph.graph)
    layers: list[LayerErasure] = []
    elements: float = 0
    bits: float = 0
    for layer, run in groupby(calls, lambda call: _layer_of(call.node, above)):
        members = list(run)
        nodes = tuple(_node_erasure(call) for call in members if verdict_of(call.node).label is Label.K)
        gray = sum(verdict_of(call.node).label is Label.GRAY for call in members)
        # Summed node by node and not layer by layer, as the summary does, so that totals agree to the last bit.
        elements = sum((node.erased_elements or 0 for node in nodes), elements)
        bits = sum((node.erased_bits or 0 for node in nodes), bits)
        layers.append(LayerErasure(layer, nodes, gray, elements, bits))
    return ErasureBudget(tuple(layers))


def _find(graph: fx.GraphModule, node: fx.Node | str) -> fx.Node:
    if not isinstance(node, (str, fx.Node)):
        raise RuleError(f"the node is a {type(node).__name__}: expected a node of the graph, or its name")
    names = {candidate.name: candidate for candidate in graph.graph.nodes}
    name = node if isinstance(node, str) else node.name
    found = names.get(name)
    if found is None:
        near = difflib.get_close_matches(name.replace(".", "_"), names, n=3)
        first = f"its first are {', '.join(map(repr, list(names)[:4]))}, and print(graph.graph) lists all"
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else first
        raise RuleError(f"this graph has no node '{name}'; {hint}")
    if isinstance(node, fx.Node) and found is not node:
        raise RuleError(f"node '{name}' belongs to another graph; pass its name, or the node of this graph")
    return found


def calls_of(graph: fx.GraphModule) -> dict[fx.Node, Call]:
    """Return every node as its rule sees it, in order.

    Raises:
        RuleError: A node is not typed.
    """
    dynamic: set[fx.Node] = set()
    calls = {}
    for node in graph.graph.nodes:
        verdict_of(node)
        calls[node] = sound.call_at(graph, node, dynamic)
        if sound.is_dynamic(calls[node]):
            dynamic.add(node)
    return calls


def operator_of(call: Call) -> str:
    """Return what people call the operator of a node, inputs, attributes and outputs included."""
    names = {"placeholder": "input", "get_attr": "attribute", "output": "output"}
    return names.get(call.node.op) or target_name(call).removeprefix("Tensor.")


# -- the walk back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrival:
    """How the walk came to a node.

    Attributes:
        steps: The S nodes on the way.
        known: What the witnesses on the way determine, with the step that needs them.
    """

    steps: tuple[PathStep, ...] = ()
    known: Mapping[fx.Node, PathStep] = field(default_factory=dict)

    def cost(self) -> tuple[bool, int, int]:
        """What is compared between two ways to one node: witnesses, then steps."""
        elements = WayBack(self.steps).witness_elements
        return elements is None, elements or 0, len(self.steps)

    def then(self, step: PathStep, known: Collection[fx.Node] = ()) -> _Arrival:
        """Return the way with one more step."""
        return _Arrival((*self.steps, step), {**dict.fromkeys(known, step), **self.known})

    def way(self, cut: Cut | None = None, reached: str | None = None) -> WayBack:
        """Return the way as it ends here."""
        return WayBack(self.steps, reached, cut)


class _Walk:
    """Visits nodes against their order, so that all users of a node come before it."""

    def __init__(self, calls: Mapping[fx.Node, Call]) -> None:
        self._calls = calls
        self._order = {node: index for index, node in enumerate(calls)}
        self._writers = [node for node, call in calls.items() if _writes(call)]
        self._arrivals: dict[fx.Node, _Arrival] = {}
        self._parts: dict[fx.Node, dict[fx.Node, _Arrival]] = defaultdict(dict)

    def back_from(self, start: fx.Node) -> Iterator[WayBack]:
        """Yield the ways back, each when it ends; none from a static node."""
        if start.op != "output" and start not in self._calls[start].dynamic:
            return
        self._arrivals[start] = _Arrival()
        for node in reversed(self._order):
            if node in self._parts:
                yield from self._join(node, self._parts[node])
            if node in self._arrivals:
                yield from self._leave(self._calls[node], self._arrivals[node])

    def _leave(self, call: Call, arrival: _Arrival) -> Iterator[WayBack]:
        """Go on to the operands that a node rebuilds, or end the way."""
        if call.node.op == "placeholder":
            yield arrival.way(reached=call.node.name)
        elif verdict_of(call.node).label is not Label.S:
            yield arrival.way(_cut(call))
        elif _takes_a_part(call):
            self._parts[call.operands[0]][call.node] = arrival
        else:
            known = self._determined_by([*arrival.known, *_witnesses(call)]) if _witnesses(call) else ()
            after = arrival.then(_step(call), known)
            operands = _rebuilt(call)
            for operand in operands:
                yield from self._arrive(operand, call.node, after)
            if not operands:
                yield after.way()

    def _arrive(self, operand: fx.Node, reader: fx.Node, arrival: _Arrival) -> Iterator[WayBack]:
        writer = self._last_writer(operand, reader)
        if operand in arrival.known:
            yield arrival.way(_no_news(operand, arrival.known[operand]))
        elif writer is not None:
            yield arrival.way(_overwritten(operand, self._calls[writer]))
        else:
            before = self._arrivals.get(operand, arrival)
            self._arrivals[operand] = min(before, arrival, key=_Arrival.cost)

    def _join(self, node: fx.Node, parts: Mapping[fx.Node, _Arrival]) -> Iterator[WayBack]:
        """Come to a node with several results from those that are determined: if these are not all, they are cut."""
        results = node.meta["val"]
        taken = {part.args[1] % len(results) for part in parts}  # type: ignore[operator]
        missing = tensors_of([result for index, result in enumerate(results) if index not in taken])
        if missing and verdict_of(node).label is Label.S:
            why = f"'{node.name}' has {len(results)} results, and the way back needs them all"
            for part, arrival in parts.items():
                yield arrival.way(_cut(self._calls[part], why, _erasure(missing)))
        else:
            arrivals = [arrival.then(_step(self._calls[part])) for part, arrival in parts.items()]
            steps = dict.fromkeys(chain.from_iterable(arrival.steps for arrival in arrivals))
            known = {key: step for arrival in arrivals for key, step in arrival.known.items()}
            self._arrivals[node] = _Arrival(tuple(steps), known)

    def _determined_by(self, values: Collection[fx.Node]) -> set[fx.Node]:
        """Return all that some values determine together, themselves included."""
        found: set[fx.Node] = set()
        waiting: list[Call] = []
        todo = list(values)
        while todo:
            node = todo.pop()
            call = self._calls[node]
            if node not in found and verdict_of(node).label is Label.S and not _takes_a_part(call):
                waiting.append(call)
            found.add(node)
            ready = [call for call in waiting if found.issuperset(_witnesses(call))]
            waiting = [call for call in waiting if call not in ready]
            todo += [operand for call in ready for operand in _rebuilt(call)]
        return found

    def _last_writer(self, operand: fx.Node, reader: fx.Node) -> fx.Node | None:
        """Return the last node that writes into an operand's memory before it is read, a view's included."""
        for writer in reversed(self._writers):
            between = self._order[operand] < self._order[writer] < self._order[reader]
            if between and _share_memory(operand, writer.all_input_nodes[0]):
                return writer
        return None


def _witnesses(call: Call) -> list[fx.Node]:
    """The operands that a node's verdict needs to rebuild the others."""
    witness = verdict_of(call.node).witness
    needed = witness.names if witness and witness.kind is WitnessKind.OTHER_OPERAND else ()
    return [operand for operand in call.operands if operand.name in needed]


def _rebuilt(call: Call) -> list[fx.Node]:
    """The dynamic operands of an S node that its verdict claims to rebuild."""
    undo, witnesses = verdict_of(call.node).undo, _witnesses(call)
    if undo is not None:
        return [call.operands[index] for index in undo.operands]
    left = [operand for operand in call.operands if operand not in witnesses]
    hands_over = call.node.op == "output" or isinstance(call.node.target, type)
    return left if hands_over or (not witnesses and _fit(left, call.node)) else left[:1]


def _fit(operands: Sequence[fx.Node], node: fx.Node) -> bool:
    """Whether a result has as many elements as the operands together, without which it cannot determine them all.

    It tells joins, which are made of their operands, from `view_as`, whose second operand lends its shape.
    """
    given = elements_of(tensors_of([operand.meta["val"] for operand in operands]))
    made = elements_of(tensors_of(node.meta.get("val")))
    return given is not None and made is not None and given <= made


def _takes_a_part(call: Call) -> bool:
    """Whether a node is one of the results of an operator that has several."""
    if call.node.target is not operator.getitem or not call.operands:
        return False
    return call.node.args[0] is call.operands[0] and isinstance(call.operands[0].meta["val"], (tuple, list))


def _writes(call: Call) -> bool:
    """Whether a node writes into the memory of its first operand."""
    if not call.operands:
        return False
    if call.module is not None:
        return bool(getattr(call.module, "inplace", False))
    name = target_name(call)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or call.node.target is operator.setitem or bool(call.node.kwargs.get("inplace", False))


def _share_memory(one: fx.Node, other: fx.Node) -> bool:
    pairs = product(tensors_of(one.meta.get("val")), tensors_of(other.meta.get("val")))
    return any(private.shares_storage(*pair) for pair in pairs)


def _step(call: Call) -> PathStep:
    verdict = verdict_of(call.node)
    witness = verdict.witness or NOTHING
    return PathStep(call.node.name, operator_of(call), verdict.label, witness, verdict.domain, source_line(call.node))


def _cut(call: Call, why: str | None = None, erasure: Erasure | None = None) -> Cut:
    verdict = verdict_of(call.node)
    erasure, why = erasure or verdict.erasure, why or verdict.rationale
    return Cut(call.node.name, operator_of(call), verdict.label, erasure, why, source_line(call.node))


def _no_news(operand: fx.Node, step: PathStep) -> Cut:
    why = f"the way needs {', '.join(step.witness.names)} here, which determines '{operand.name}' already"
    return Cut(step.node, step.operator, step.label, None, why, step.source)


def _overwritten(operand: fx.Node, writer: Call) -> Cut:
    if verdict_of(writer.node).label is not Label.S:
        return _cut(writer)
    return _cut(writer, f"it writes into the memory of '{operand.name}' through a view, which is not followed")


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors that a value is or holds."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def elements_of(tensors: Sequence[torch.Tensor]) -> int | None:
    """Return how many elements tensors have per sample; None where that is not proportional to the batch."""
    counts = [sizes.elements(tensor) for tensor in tensors]
    return None if None in counts else sum(count for count in counts if count is not None)


def _erasure(missing: Sequence[torch.Tensor]) -> Erasure | None:
    elements = elements_of(missing)
    return None if elements is None else Erasure(elements)


# -- the erasure budget ---------------------------------------------------------------------------------------------


def _node_erasure(call: Call) -> NodeErasure:
    erasure = verdict_of(call.node).erasure
    return NodeErasure(
        call.node.name,
        operator_of(call),
        "" if call.module is None else str(call.node.target),
        None if erasure is None else erasure.elements,
        None if erasure is None else erasure.bits,
        elements_of(tensors_of([operand.meta["val"] for operand in call.operands])),
    )


def _above_blocks(graph: fx.Graph) -> set[str]:
    """The paths of all modules that hold a block: the model itself, `vit`, `vit.layers`."""
    above = {""}
    for path, _ in blocks(graph):
        container, _ = section_and_index(path)
        while container:
            above.add(container)
            container = container.rpartition(".")[0]
    return above


def _layer_of(node: fx.Node, above: Collection[str]) -> str:
    """The outermost module around a node that holds no block: inside of a block that is the block itself."""
    return next((path for path in node.meta.get("nn_module_stack") or () if path not in above), "")
