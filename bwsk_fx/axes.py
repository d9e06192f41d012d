"""Follows axes through a torch-level graph: what every node claims about each of them.

The graph is walked once with axes in place of sizes. Fused regions are walked through, so a graph claims the same
before and after fusing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx.errors import RuleError
from bwsk_fx.rules import (  # noqa: F401  (their rules register on import)
    activation,
    affine,
    attention,
    axis_aten,
    convolution,
    elementwise,
    factories,
    indexing,
    lookup,
    loss,
    normalization,
    padding,
    pooling,
    products,
    random,
    reduction,
    resampling,
    scans,
    shape,
    softmax,
    sorting,
)
from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, axis_rule_of, claims, no_rule
from bwsk_fx.rules.axis_composition import composed
from bwsk_fx.rules.axis_table import Axis, AxisTable, Strength, extent, sizes_of

_GUESSES: dict[tuple[bool, int], tuple[str, ...]] = {
    (False, 2): ("batch", "token"),
    (True, 2): ("batch", "feature"),
    (True, 3): ("batch", "token", "feature"),
    (True, 4): ("batch", "channel", "height", "width"),
    (True, 5): ("batch", "channel", "depth", "height", "width"),
}


@dataclass(frozen=True)
class Step:
    """One node, regions opened.

    Attributes:
        node: The node.
        target: What it calls, in words.
        inputs: Its tensor operands.
        results: Its tensor results.
        claims: What it does on each axis; axes that bundle others are taken apart.
        unknown: Whether it has no axis rule.
    """

    node: fx.Node
    target: str
    inputs: tuple[Value, ...]
    results: tuple[Value, ...]
    claims: tuple[Claim, ...]
    unknown: bool = False


def follow_axes(graph: fx.GraphModule) -> tuple[tuple[Step, ...], AxisTable]:
    """Walk a captured graph and return what each node claims, with the axes that the claims are about.

    Raises:
        RuleError: A node has no value to read its sizes from, or an axis rule returns axes that do not fit it.
    """
    walk = _Walk()
    walk.run(graph, None)
    while (same := walk.late_identities()) != walk.known:
        # A rule has spoken of two axes that a later node made one.
        walk = _Walk(same)
        walk.run(graph, None)
    steps = (replace(step, claims=tuple(_resolved(step.claims, walk.axes))) for step in walk.steps)
    return tuple(steps), walk.axes


Place = tuple[fx.Node, int]
"""A node and a dimension of its result."""


@dataclass
class _Walk:
    """One walk through a graph.

    Attributes:
        known: Where an axis is born that is one with an axis born before, by an earlier walk: its twin's place.
        born: The axes of inputs, and of what is made without operands, by their places.
    """

    known: dict[Place, Place] = field(default_factory=dict)
    born: dict[Place, Axis] = field(default_factory=dict)
    axes: AxisTable = field(default_factory=AxisTable)
    steps: list[Step] = field(default_factory=list)
    static: set[fx.Node] = field(default_factory=set)

    def run(self, graph: fx.GraphModule, arguments: Sequence[Any] | None) -> Any:
        """Walk one graph, a region's with the values of its call, and return what it returns."""
        env: dict[fx.Node, Any] = {}
        given = iter(arguments or ())
        for node in graph.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                env[node] = self._input(node) if arguments is None else next(given)
            else:
                env[node] = self._visit(graph, node, env)
        return None

    def _input(self, node: fx.Node) -> Any:
        value = _value_of(node)
        if not isinstance(value, torch.Tensor):
            return value
        guesses = _GUESSES.get((value.is_floating_point(), value.dim()), ("batch",))
        guesses = (*guesses, *("",) * (value.dim() - len(guesses)))[: value.dim()]
        layout = tuple(self._input_axis(size, name) for size, name in zip(value.shape, guesses, strict=True))
        self._bear(node, layout)
        said = claims(layout, Behaviour.MAP, "the facts of an input arrive shard by shard", consumed=False)
        result = _as_value(node, value, layout)
        self.steps.append(Step(node, "input", (), (result,), tuple(said)))
        return result

    def _input_axis(self, size: int | torch.SymInt, name: str) -> Axis | None:
        if isinstance(size, torch.SymInt):
            return self.axes.of_symbol(extent(size), name)
        return None if size == 1 else self.axes.new(name, Strength.GUESS)

    def _bear(self, node: fx.Node, layout: Sequence[Axis | None]) -> None:
        """Remember where axes are born, and make those one that are going to be."""
        for dim, axis in enumerate(layout):
            if axis is not None:
                twin = self.born.get(self.known.get((node, dim), (node, dim)))
                self.born[node, dim] = axis if twin is None else self.axes.unify(twin, axis)

    def late_identities(self) -> dict[Place, Place]:
        """Return the places of axes that turned out to be one with an axis born before."""
        first: dict[Axis, Place] = {}
        pairs = ((place, first.setdefault(self.axes.find(axis), place)) for place, axis in self.born.items())
        return {place: twin for place, twin in pairs if place != twin}

    def _visit(self, graph: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        target = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        subgraph = getattr(target, "subgraph", None)
        if isinstance(subgraph, fx.GraphModule):
            return self.run(subgraph, args)
        if target is operator.getitem and _is_region(graph, node.args[0]):
            return args[0][args[1]]
        value = _value_of(node)
        if node.op == "get_attr":
            self.static.add(node)
            return _as_value(node, value, self.axes.fresh(sizes_of(value)))
        if isinstance(target, type) or not (_tensors(value) or value is None):
            # Classes hand results over; everything else without tensors is a size.
            return extent(value) if isinstance(value, torch.SymInt) else value
        args, kwargs = self._loosened((args, kwargs))
        return self._call(AxisCall(node, target, args, kwargs, tuple(map(sizes_of, _tensors(value))), self.axes))

    def _loosened(self, arguments: Any) -> Any:
        """Give constants axes of their own in each call with data: every shard has all of their facts.

        Otherwise a mask that meets queries here and keys there would make one axis of the two.
        """
        values = [leaf for leaf in _leaves(arguments) if isinstance(leaf, Value)]
        fixed = [value for value in values if value.node in self.static]
        if len(fixed) == len(values):
            return arguments
        own = {id(value): replace(value, layout=self.axes.fresh(value.shape)) for value in fixed}
        return pytree.tree_map(lambda leaf: own.get(id(leaf), leaf), arguments, is_leaf=_is_value)

    def _call(self, call: AxisCall) -> Any:
        effect, known = self._effect(call)
        if len(effect.layouts) == 1 and not any(claim.consumed for claim in effect.claims):
            self._bear(call.node, effect.layouts[0])
        value = call.node.meta["val"]
        results = tuple(
            _as_value(call.node, tensor, layout) for tensor, layout in zip(_tensors(value), effect.layouts, strict=True)
        )
        words = _words(call.target)
        self.steps.append(Step(call.node, words, call.inputs, results, effect.claims, unknown=not known))
        remaining = iter(results)
        return pytree.tree_map_only(torch.Tensor, lambda _: next(remaining), value)

    def _effect(self, call: AxisCall) -> tuple[Effect, bool]:
        """Return what a call does, and whether a rule says so."""
        if self.static.issuperset(value.node for value in call.inputs):
            self.static.add(call.node)
            return self._constant(call), True
        if call.target is operator.getitem and isinstance(call.args[0], (tuple, list)):
            return _picked(call), True
        if call.target is torch.ops.aten._assert_tensor_metadata.default:
            # It reads the dtype and the device, no element.
            return Effect((), ()), True
        # What writes into an operand has no results, and no rule speaks of it.
        rule = axis_rule_of(call.target) if call.shapes else no_rule
        if rule is no_rule and call.shapes and (effect := composed(call)) is not None:
            return effect, True
        return rule(call), rule is not no_rule

    def _constant(self, call: AxisCall) -> Effect:
        """Return the effect of a call on parameters and constants alone, which every shard can make by itself."""
        rule = axis_rule_of(call.target)
        effect = rule(call) if call.inputs and call.shapes and rule is not no_rule else None
        if effect is None or not all(claim.behaviour.coordination_free for claim in effect.claims):
            return Effect((), tuple(map(self.axes.fresh, call.shapes)))
        return effect


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


def _leaves(arguments: Any) -> list[Any]:
    return pytree.tree_leaves(arguments, is_leaf=_is_value)


def _picked(call: AxisCall) -> Effect:
    layouts = tuple(value.layout for value in _leaves(call.args[0][call.args[1]]))
    said = (claim for layout in layouts for claim in claims(layout, Behaviour.MAP, "one of several results"))
    return Effect(tuple(dict.fromkeys(said)), layouts)


def _is_region(graph: fx.GraphModule, operand: Any) -> bool:
    if not (isinstance(operand, fx.Node) and operand.op == "call_module"):
        return False
    return isinstance(getattr(graph.get_submodule(str(operand.target)), "subgraph", None), fx.GraphModule)


def _value_of(node: fx.Node) -> Any:
    if "val" not in node.meta:
        raise RuleError(f"node '{node.name}' has no meta['val'], so its axes are unknown; run PropagateValues first")
    return node.meta["val"]


def _as_value(node: fx.Node, value: torch.Tensor, layout: Sequence[Axis | None]) -> Value:
    if len(layout) != value.dim():
        raise RuleError(f"the axis rule of node '{node.name}' gives {len(layout)} axes for {value.dim()} dimensions")
    return Value(node, tuple(layout), sizes_of(value), value.element_size())


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _words(target: Any) -> str:
    if isinstance(target, nn.Module):
        return type(target).__name__
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _resolved(said: Sequence[Claim], axes: AxisTable) -> Iterator[Claim]:
    """Replace bundles by their axes, and axes by what stands for them now that the whole graph is known."""
    found = (replace(claim, axis=axis) for claim in said for axis in axes.atoms([claim.axis]))
    return iter(dict.fromkeys(found))
