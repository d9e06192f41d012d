"""Axes of a call without an axis rule, from those of the ATen operators that it is made of.

Where every operator inside maps an axis, so does the call. Where one of them sums over an axis or waits for it, the
call waits: what it does with the sum afterwards is its own business.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, axis_rule_of, no_rule
from bwsk_fx.rules.axis_table import Axis, sizes_of
from bwsk_fx.rules.decomposition import Decomposition, UndecomposableError, decompose


def composed(call: AxisCall) -> Effect | None:
    """Return what a call does to its axes; None where it cannot be taken apart, or a part has no rule."""
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda node: node.meta["val"], (call.node.args, dict(call.node.kwargs))
    )
    operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    try:
        parts = decompose(call.target, args, kwargs, operands)
    except UndecomposableError:
        return None
    walk = _Inside(call, parts)
    return walk.effect() if walk.run() and len(parts.outputs) == len(call.shapes) else None


class _Inside:
    """Follows axes through the operators of one call."""

    def __init__(self, call: AxisCall, parts: Decomposition) -> None:
        self.call, self.parts = call, parts
        self.values: dict[fx.Node, Any] = dict(zip(parts.operands, call.inputs, strict=True))
        self.said: list[Claim] = []

    def run(self) -> bool:
        """Walk the operators; False where one of them has no rule."""
        for node, tensor in self.parts.statics.items():
            self.values[node] = self._value(node, tensor, self.call.axes.fresh(sizes_of(tensor)))
        return all(map(self._visit, self.parts.steps()))

    def effect(self) -> Effect:
        """Return the strictest behaviour of each axis that enters or leaves the call."""
        axes = self.call.axes
        layouts = tuple(self.values[node].layout for node in self.parts.outputs)
        before = axes.atoms(axis for value in self.call.inputs for axis in value.layout)
        after = axes.atoms(axis for layout in layouts for axis in layout)
        behaviours: dict[Axis, set[Behaviour]] = defaultdict(set)
        for claim in self.said:
            for axis in axes.atoms([claim.axis]):
                behaviours[axis].add(claim.behaviour)
        claims = [
            _claim(axis, behaviours[axis], consumed=axis in before, produced=axis in after)
            for axis in dict.fromkeys((*before, *after))
        ]
        return Effect(tuple(claims), layouts)

    def _visit(self, step: fx.Node) -> bool:
        if step.target is operator.getitem:
            source, index = step.args
            self.values[step] = self.values[source][index]  # type: ignore[index]
            return True
        args, kwargs = pytree.tree_map_only(fx.Node, self.values.__getitem__, (step.args, dict(step.kwargs)))
        results = [leaf for leaf in pytree.tree_leaves(step.meta["val"]) if isinstance(leaf, Tensor)]
        if not results:
            self.values[step] = step.meta["val"]
            return True
        inner = AxisCall(step, step.target, args, kwargs, tuple(map(sizes_of, results)), self.call.axes)
        rule = axis_rule_of(step.target)
        if rule is no_rule and inner.inputs:
            return False
        # What has no operands, every shard can make or draw for itself.
        effect = rule(inner) if inner.inputs else Effect((), tuple(map(self.call.axes.fresh, inner.shapes)))
        self.said += effect.claims
        made = tuple(self._value(step, *pair) for pair in zip(results, effect.layouts, strict=True))
        self.values[step] = made[0] if isinstance(step.meta["val"], Tensor) else made
        return True

    def _value(self, node: fx.Node, tensor: Tensor, layout: Any) -> Value:
        return Value(node, tuple(layout), sizes_of(tensor), tensor.element_size())


def _claim(axis: Axis, behaviours: set[Behaviour], *, consumed: bool, produced: bool) -> Claim:
    if behaviours <= {Behaviour.MAP}:
        return Claim(axis, Behaviour.MAP, "each of the operators inside maps it", consumed=consumed, produced=produced)
    why = "an operator inside sums over the axis or waits for it"
    return Claim(axis, Behaviour.BARRIER, why, consumed=consumed, produced=produced)
