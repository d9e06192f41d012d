"""Axis behaviour: the vocabulary, what a rule sees and says, and the registry of axis rules.

A tensor is read as a set of facts (index -> value) that arrive shard by shard along an axis. A rule tells, for every
axis that a torch-level call touches, whether the call can run on each shard alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx.rules.axis_table import Axis, AxisTable, Extent, Layout, per_sample
from bwsk_fx.rules.targets import Registry


class Behaviour(StrEnum):
    """What a call needs to know of an axis, from nothing but one shard to all of it."""

    MAP = "MAP"
    JOIN = "JOIN"
    REDUCE = "REDUCE"
    BARRIER = "BARRIER"

    @property
    def coordination_free(self) -> bool:
        """Whether shards never wait for each other: mapped, or merged by an idempotent join."""
        return self in (Behaviour.MAP, Behaviour.JOIN)


SEVERITY: Mapping[Behaviour, int] = {behaviour: rank for rank, behaviour in enumerate(Behaviour)}


@dataclass(frozen=True)
class Value:
    """A tensor as the rules see it.

    Attributes:
        node: The torch-level node that computes it.
        layout: Its axis per dimension; None where the dimension has size one.
        shape: Its sizes, symbolic ones as expressions.
        itemsize: Bytes per element.
    """

    node: fx.Node
    layout: Layout
    shape: tuple[Extent, ...]
    itemsize: int

    @property
    def bytes_per_sample(self) -> int:
        """Its size in bytes for a batch of one."""
        return math.prod(per_sample(size) for size in self.shape) * self.itemsize

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)


@dataclass(frozen=True)
class Claim:
    """What a call does on one axis.

    Attributes:
        axis: The axis; one that merges several speaks for each of them.
        behaviour: The behaviour.
        reason: One sentence.
        role: Which part the axis plays where a call has several of one name ("input", "output", "key").
        consumed: Whether operands carry the axis here.
        produced: Whether the result carries it.
        moved: Bytes per sample that coordination moves; None for the usual: the result of a REDUCE, the operands of
            a BARRIER.
    """

    axis: Axis
    behaviour: Behaviour
    reason: str
    role: str = ""
    consumed: bool = True
    produced: bool = True
    moved: int | None = None


@dataclass(frozen=True)
class Effect:
    """What an axis rule returns: the claims, and the layout of each result."""

    claims: tuple[Claim, ...]
    layouts: tuple[Layout, ...]


@dataclass(frozen=True)
class AxisCall:
    """One torch-level call with its operands as `Value`s.

    Attributes:
        node: The node.
        target: The module, the function, or the method's name.
        args: Positional arguments; nodes replaced by values, or by the sizes that they hold.
        kwargs: Keyword arguments, likewise.
        shapes: The shape of each result.
        axes: The axes of the graph.
    """

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: tuple[tuple[Extent, ...], ...]
    axes: AxisTable

    @property
    def inputs(self) -> tuple[Value, ...]:
        """All tensor operands, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)), is_leaf=lambda leaf: isinstance(leaf, Value))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Value))

    @property
    def operand(self) -> Value:
        """The first tensor operand."""
        return self.inputs[0]

    @property
    def shape(self) -> tuple[Extent, ...]:
        """The shape of the first result."""
        return self.shapes[0]

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """Return an option: an attribute of the module, or an argument by keyword or position."""
        if isinstance(self.target, nn.Module):
            return getattr(self.target, name, default)
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def dims(self, name: str = "dim", position: int = 1) -> tuple[int, ...]:
        """Return an option that names dimensions of the operand, counted from the front; all of them if None."""
        given = self.option(name, position)
        if given is None or isinstance(given, bool):
            return tuple(range(self.operand.rank))
        several = given if isinstance(given, (tuple, list)) else (given,)
        return tuple(dim % max(self.operand.rank, 1) for dim in several)


AxisRule = Callable[[AxisCall], Effect]
_RULES: Registry[AxisRule] = Registry("axis rule")
axis_rule = _RULES.register


def axis_rule_of(target: Any) -> AxisRule:
    """Return the rule of a module, a function or a method's name; `no_rule` where there is none."""
    return _RULES.of(target) or no_rule


def no_rule(call: AxisCall) -> Effect:
    """Claim nothing that nobody proved: a BARRIER on every axis of every operand and result."""
    return opaque(call, "no axis rule")


def opaque(call: AxisCall, reason: str) -> Effect:
    """Return a BARRIER on every axis; only the axes of symbolic sizes are recognised behind it."""
    layouts = tuple(call.axes.fresh(shape) for shape in call.shapes)
    consumed = {axis for value in call.inputs for axis in call.axes.atoms(value.layout)}
    produced = {axis for layout in layouts for axis in call.axes.atoms(layout)}
    claims = [
        Claim(axis, Behaviour.BARRIER, reason, consumed=axis in consumed, produced=axis in produced)
        for axis in sorted(consumed | (produced if consumed else set()))
    ]
    return Effect(tuple(claims), layouts)


def claims(
    layout: Iterable[Axis | None],
    behaviour: Behaviour,
    reason: str,
    *,
    role: str = "",
    consumed: bool = True,
    produced: bool = True,
    moved: int | None = None,
) -> list[Claim]:
    """Return one claim per axis of a layout."""
    return [Claim(axis, behaviour, reason, role, consumed, produced, moved) for axis in layout if axis is not None]


def renumbered(
    before: Axis | None, after: Axis | None, reason: str, behaviour: Behaviour = Behaviour.MAP
) -> list[Claim]:
    """Return the claims on an axis of the operand and on that of the result which has its facts under other indices."""
    return [
        *claims([before], behaviour, reason, role="operand", produced=False),
        *claims([after], behaviour, reason, role="result", consumed=False),
    ]


def mapped(layout: Layout, reason: str) -> Effect:
    """Return the effect of a call that keeps every axis and maps each of its facts on its own."""
    return Effect(tuple(claims(layout, Behaviour.MAP, reason)), (layout,))


def along(
    call: AxisCall, dims: Sequence[int], behaviour: Behaviour, reason: str, others: str, *, keeps: bool
) -> Effect:
    """Return the effect of a call that acts on `dims` of its operand and maps the other axes.

    Args:
        call: The call.
        dims: The dimensions it acts on.
        behaviour: What it does there.
        reason: Why.
        others: Why the other axes are mapped.
        keeps: Whether the result still has the axes of `dims`.
    """
    layout = call.operand.layout
    acted = claims((layout[dim] for dim in dims), behaviour, reason, produced=keeps)
    rest = tuple(None if dim in dims else axis for dim, axis in enumerate(layout))
    kept = layout if keeps else rest
    if not keeps and len(call.shape) < len(layout):
        kept = tuple(axis for dim, axis in enumerate(layout) if dim not in dims)
    return Effect((*acted, *claims(rest, Behaviour.MAP, others)), (kept,) * len(call.shapes))


def broadcast(call: AxisCall, reason: str) -> Effect:
    """Return the effect of an elementwise call: operands align from the right and share their axes."""
    layout, clashes = aligned(call.axes, [value.layout for value in call.inputs], len(call.shape))
    return Effect((*claims(layout, Behaviour.MAP, reason), *clashes), (layout,))


def aligned(axes: AxisTable, layouts: Sequence[Layout], rank: int) -> tuple[Layout, list[Claim]]:
    """Align layouts from the right, and identify their axes with one another.

    Returns:
        The common layout, and a BARRIER for each axis that would meet itself under other indices.
    """
    common: list[Axis | None] = [None] * rank
    clashes: list[Claim] = []
    for layout in layouts:
        for dim, axis in enumerate(layout, start=rank - len(layout)):
            if axis is None:
                continue
            if _meets_itself(axes, common, dim, axis):
                reason = "the axis meets itself under other indices, so a shard needs facts of other shards"
                clashes += claims([axis], Behaviour.BARRIER, reason, produced=False)
            else:
                there = common[dim]
                common[dim] = axis if there is None else axes.unify(there, axis)
    return tuple(common), clashes


def _meets_itself(axes: AxisTable, common: Sequence[Axis | None], dim: int, axis: Axis) -> bool:
    there, others = common[dim], [kept for place, kept in enumerate(common) if place != dim]
    return axes.overlap([axis], others) or (there is not None and axes.relabelled(there, axis))
