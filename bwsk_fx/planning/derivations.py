"""Joint graph to hypergraph: every way in which the backward pass can come by a forward value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import fx

from bwsk_fx.planning.cost import CostModel, emitted_seconds, is_intensive
from bwsk_fx.planning.joint import JointGraph, is_constant, is_random
from bwsk_fx.planning.jumps import jumps
from bwsk_fx.planning.simplify import operands_again, updates_state

# Importing a family fills the registry of inverses.
from bwsk_fx.rules import (  # noqa: F401
    inverse_activation,
    inverse_elementwise,
    inverse_linear,
    inverse_normalization,
    inverse_shape,
    random,
)
from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, inverses_of
from bwsk_fx.rules.replay import generator_state

# Its place among the results of a batch norm in train mode; the running variance follows.
_RUNNING_MEAN = 3


class Kind(Enum):
    """How a derivation comes by its value."""

    RECOMPUTE = "recompute"
    INVERT = "invert"


@dataclass(frozen=True)
class Derivation:
    """A hyperedge: `head` can be had from all of `tails`.

    Attributes:
        head: The value that is derived.
        tails: The dynamic or static values it is derived from.
        kind: Forwards (recompute) or backwards (invert).
        emit: Appends the computation to a graph, given the nodes that hold `tails` there.
        exact: Whether the derived value has the bits of the original.
        seconds: Modelled time.
        intensive: Whether it runs a matrix product, convolution or attention again.
        rule: What it is called in reports.
        originals: Whether its tails have to be the originals, bit for bit: it takes branches by what they are, or it
            magnifies what they are off by.
    """

    head: fx.Node
    tails: tuple[fx.Node, ...]
    kind: Kind
    emit: Emit
    exact: bool
    seconds: float
    intensive: bool
    rule: str
    originals: bool = False


@dataclass(frozen=True)
class Hypergraph:
    """Values, the derivations between them, and the classes of values that are views of each other.

    Attributes:
        values: Every forward-side node, witnesses included, in graph order.
        derivations: Every way to obtain one value from others, free views excluded.
        views: Free derivations in both directions, between values of one class.
        class_of: Value to the first value of its class; one that is kept serves for all of its class.
        witness_seconds: Modelled time of what the forward pass computes for the sake of a class alone.
    """

    values: tuple[fx.Node, ...]
    derivations: tuple[Derivation, ...]
    views: tuple[Derivation, ...]
    class_of: dict[fx.Node, fx.Node]
    witness_seconds: dict[fx.Node, float] = field(default_factory=dict)


def derive(
    joint: JointGraph, costs: CostModel, *, exact: bool, invert: bool = True, compiled: bool = False
) -> Hypergraph:
    """Enumerate the derivations of a joint graph's forward values.

    Witness nodes of the inverse rules are added to `joint.graph` on the way; they cost nothing unless a plan uses
    them.

    Args:
        joint: The graph to read.
        costs: Says how long each derivation takes.
        exact: Leave out every derivation that may change a bit.
        compiled: Leave out what a compiler cannot trace.
        invert: Whether values may be rebuilt from what was made of them; views go both ways all the same.
    """
    inverses = [one for one in _inverses(joint, costs, exact, compiled) if invert or one.seconds == 0.0]
    values = tuple(node for node in joint.graph.nodes if node.op != "output" and node not in joint.backward)
    recomputations = [_recompute(node, costs) for node in values if _can_recompute(node)]
    free = [one for one in recomputations + inverses if one.seconds == 0.0 and len(one.tails) == 1]
    both_ways = {(one.head, one.tails[0]) for one in free}
    views = tuple(one for one in free if (one.tails[0], one.head) in both_ways)
    class_of = _classes(values, views)
    inside = set(map(id, views))
    others = tuple(one for one in recomputations + inverses if id(one) not in inside)
    return Hypergraph(values, others, views, class_of, _witness_seconds(class_of, costs))


def keepable(node: fx.Node) -> bool:
    """Whether a value can be saved for the backward pass as a tensor of its own."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _can_recompute(node: fx.Node) -> bool:
    if node.target is generator_state:
        # It is another one by then.
        return False
    if "witness_of" in node.meta and jumps(node):
        # Which branch a value is in helps to rebuild that very value.
        return False
    if node.target is operator.getitem and updates_state(node.args[0]) and node.args[1] >= _RUNNING_MEAN:  # type: ignore[arg-type, operator]
        # A batch norm that runs again does not compute its next statistics.
        return False
    return node.op == "call_function" and not is_random(node) and not is_constant(node)


def _recompute(node: fx.Node, costs: CostModel) -> Derivation:
    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        at = dict(zip(operands_again(node), tails, strict=True))
        # What a batch norm leaves alone when it runs again is not there.
        return graph.node_copy(node, at.get if updates_state(node) else at.__getitem__)

    seconds = 0.0 if node.target is operator.getitem else costs.seconds(node)
    name = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
    tails, work = operands_again(node), is_intensive(node)
    return Derivation(node, tails, Kind.RECOMPUTE, emit, True, seconds, work, name, jumps(node))


def _inverses(joint: JointGraph, costs: CostModel, exact: bool, compiled: bool) -> list[Derivation]:
    witnesses = WitnessWriter(joint.graph)
    found = []
    for node in list(joint.graph.nodes):
        if node.op != "call_function" or node in joint.backward:
            continue
        for inverse in inverses_of(node, witnesses):
            if (inverse.exact or not exact) and (inverse.compiles or not compiled):
                seconds = 0.0 if inverse.free else emitted_seconds(costs, inverse.emit, inverse.tails)
                found.append(_inversion(inverse, seconds))
    return found


def _inversion(inverse: Inverse, seconds: float) -> Derivation:
    one = inverse
    return Derivation(
        one.head, one.tails, Kind.INVERT, one.emit, one.exact, seconds, one.intensive, one.rule, one.magnifies
    )


def _witness_seconds(class_of: dict[fx.Node, fx.Node], costs: CostModel) -> dict[fx.Node, float]:
    """Sum, for each class, the witness nodes that its first value is made by."""
    seconds: dict[fx.Node, float] = {}
    for cls in class_of.values():
        if "witness_of" in cls.meta and cls not in seconds:
            made = _witnesses_before(cls)
            seconds[cls] = sum(costs.seconds(node) for node in made)
    return seconds


def _witnesses_before(node: fx.Node) -> set[fx.Node]:
    found = {node}
    for operand in node.all_input_nodes:
        if "witness_of" in operand.meta:
            found |= _witnesses_before(operand)
    return found


def _classes(values: Sequence[fx.Node], views: Sequence[Derivation]) -> dict[fx.Node, fx.Node]:
    """Group values that are views of each other; the first in graph order stands for its class."""
    parent = {value: value for value in values}

    def root(value: fx.Node) -> fx.Node:
        while parent[value] is not value:
            value = parent[value]
        return value

    order = {value: index for index, value in enumerate(values)}
    for view in views:
        first, second = sorted((root(view.head), root(view.tails[0])), key=order.__getitem__)
        parent[second] = first
    return {value: root(value) for value in values}
