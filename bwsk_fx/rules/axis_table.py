"""The axes of one graph: their identities, their names, and the axes that they are made of.

Operators give names and identify axes with one another (the two operands of an addition share theirs), so that an
axis keeps its identity through transposes, residual additions and reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

Extent = Any
"""A size: an int, or the sympy expression of a symbolic size."""


class Strength(IntEnum):
    """How sure a name is; a stronger one replaces a weaker one, and the first of equals stays."""

    GUESS = 0
    OPERATOR = 1
    CONTEXT = 2


@dataclass(frozen=True, order=True)
class Axis:
    """One axis; two of them may turn out to be the same, which `AxisTable.find` knows."""

    uid: int


Layout = tuple[Axis | None, ...]


def extent(size: int | torch.SymInt) -> Extent:
    """Return a size without ever asking for the value of a symbolic one."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def sizes_of(tensor: torch.Tensor) -> tuple[Extent, ...]:
    """Return the sizes of a tensor, symbolic ones as expressions."""
    return tuple(map(extent, tensor.shape))


def per_sample(size: Extent | torch.SymInt) -> int:
    """Return a size for a batch of one."""
    known = extent(size)
    return known if isinstance(known, int) else int(known.subs(dict.fromkeys(known.free_symbols, 1)))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor for a batch of one."""
    return math.prod(map(per_sample, tensor.shape)) * tensor.element_size()


class AxisTable:
    """Creates, names, identifies and takes apart the axes of one graph."""

    def __init__(self) -> None:
        self._parents: list[Axis] = []
        self._names: list[tuple[Strength, str]] = []
        self._parts: list[tuple[tuple[Axis, Extent], ...]] = []
        self._origins: list[tuple[Axis, ...]] = []
        self._symbols: dict[Any, Axis] = {}

    def new(
        self,
        name: str = "",
        strength: Strength = Strength.OPERATOR,
        parts: Sequence[tuple[Axis, Extent]] = (),
        origins: Sequence[Axis] = (),
    ) -> Axis:
        """Create an axis.

        Args:
            name: Its name, if an operator gives one.
            strength: How sure the name is.
            parts: The axes and sizes that it is made of, from the outermost to the innermost.
            origins: Axes whose facts it has under other indices: a slice, a concatenation.
        """
        axis = Axis(len(self._parents))
        self._parents.append(axis)
        self._names.append((strength if name else Strength.GUESS, name))
        self._parts.append(tuple(parts))
        self._origins.append(tuple(origins))
        return axis

    def derived(self, name: str, origins: Sequence[Axis]) -> Axis:
        """Create the axis that has the facts of `origins` under other indices."""
        return self.new(name or next(filter(None, map(self.name, origins)), ""), origins=origins)

    def find(self, axis: Axis) -> Axis:
        """Return the representative of all axes that are the same as this one."""
        while self._parents[axis.uid] != axis:
            self._parents[axis.uid] = self._parents[self._parents[axis.uid].uid]
            axis = self._parents[axis.uid]
        return axis

    def name(self, axis: Axis) -> str:
        """Return the name of an axis; empty as long as no operator gave one."""
        return self._names[self.find(axis).uid][1]

    def parts(self, axis: Axis) -> tuple[tuple[Axis, Extent], ...]:
        """Return the axes and sizes that an axis is made of, as far as known."""
        return self._parts[self.find(axis).uid]

    def decompose(self, axis: Axis, parts: Sequence[tuple[Axis, Extent]]) -> None:
        """Record what an axis is made of, so that the parts merge back into it and split alike elsewhere."""
        self._parts[self.find(axis).uid] = tuple(parts)

    def call(self, axis: Axis | None, name: str, strength: Strength = Strength.OPERATOR) -> None:
        """Name an axis, unless its name is as strong already or it only bundles named axes."""
        if axis is None or self._is_bundle(axis):
            return
        root = self.find(axis).uid
        known, before = self._names[root]
        if not before or strength > known:
            self._names[root] = (strength, name)

    def unify(self, one: Axis, other: Axis) -> Axis:
        """Record that two axes are the same and return what stands for both."""
        one, other = self.find(one), self.find(other)
        if one == other:
            return one
        mine, theirs = self._parts[one.uid], self._parts[other.uid]
        if len(mine) == len(theirs) and all(a[1] == b[1] for a, b in zip(mine, theirs, strict=True)):
            for (part, _), (twin, _) in zip(mine, theirs, strict=True):
                self.unify(part, twin)
        if self._rank(other) > self._rank(one):
            one, other = other, one
        self._parents[other.uid] = one
        self._parts[one.uid] = self._parts[one.uid] or self._parts[other.uid]
        self._origins[one.uid] += self._origins[other.uid]
        return one

    def origins(self, axis: Axis) -> tuple[Axis, ...]:
        """Return the axes whose facts an axis has under other indices."""
        return tuple(dict.fromkeys(map(self.find, self._origins[self.find(axis).uid])))

    def relabelled(self, one: Axis, other: Axis) -> bool:
        """Whether one axis has facts of the other under other indices, so that equal indices do not belong together."""
        return self._descends(one, self.find(other)) or self._descends(other, self.find(one))

    def atoms(self, layout: Iterable[Axis | None]) -> list[Axis]:
        """Return the representatives of the axes of a layout, bundles taken apart, each once."""
        found: dict[Axis, None] = {}
        for axis in layout:
            if axis is None:
                continue
            inner = self.atoms(part for part, _ in self.parts(axis)) if self._is_bundle(axis) else [self.find(axis)]
            found.update(dict.fromkeys(inner))
        return list(found)

    def overlap(self, one: Iterable[Axis | None], other: Iterable[Axis | None]) -> bool:
        """Whether two layouts share an axis."""
        return not set(self.atoms(one)).isdisjoint(self.atoms(other))

    def fresh(self, shape: Sequence[Extent]) -> Layout:
        """Return nameless axes for a shape; a symbolic size that is known keeps its axis."""
        return tuple(self._fresh(size) for size in shape)

    def of_symbol(self, size: Extent, name: str) -> Axis:
        """Return the axis of a symbolic size, which it gets with the first input that has it."""
        if size not in self._symbols:
            self._symbols[size] = self.new(name, Strength.CONTEXT)
        return self._symbols[size]

    def _fresh(self, size: Extent) -> Axis | None:
        if isinstance(size, int):
            return None if size == 1 else self.new()
        return self._symbols.get(size) or self.new()

    def _descends(self, axis: Axis, ancestor: Axis) -> bool:
        seen, waiting = set(), list(self.origins(axis))
        while waiting:
            origin = waiting.pop()
            if origin == ancestor:
                return True
            if origin not in seen:
                seen.add(origin)
                waiting += self.origins(origin)
        return False

    def _is_bundle(self, axis: Axis) -> bool:
        return bool(self.parts(axis)) and not self.name(axis)

    def _rank(self, axis: Axis) -> tuple[bool, int, bool]:
        strength, name = self._names[axis.uid]
        return bool(name), strength, bool(self._parts[axis.uid])
