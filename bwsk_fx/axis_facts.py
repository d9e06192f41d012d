"""Where the facts of an axis lie in a real tensor: which index of the axis each element belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.axis import Value
from bwsk_fx.rules.axis_table import Axis, AxisTable, Extent


@dataclass(frozen=True)
class Facts:
    """The axes of a graph on tensors of one call.

    Attributes:
        axes: The axes, once the whole graph is known.
        sizes: What the symbols of symbolic sizes stand for.
    """

    axes: AxisTable
    sizes: Mapping[Any, int]

    def indices(self, value: Value, shape: Sequence[int], axis: Axis) -> Tensor | None:
        """Return the index along `axis` of every element of a tensor, in a shape that broadcasts to the tensor's.

        Args:
            value: What is known of the tensor.
            shape: Its real sizes.
            axis: The axis; it may be one of several in a merged dimension, or be split into several dimensions.

        Returns:
            Integers; None where the tensor does not carry the axis.
        """
        for dim, own in enumerate(value.layout):
            if own is not None and (found := self._along(own, shape[dim], axis)) is not None:
                return found.view(-1, *[1] * (len(shape) - dim - 1))
        return self._of_parts(value, shape, axis)

    def dim(self, value: Value, axis: Axis) -> int | None:
        """Return the dimension that carries an axis, whole or merged with others."""
        for dim, own in enumerate(value.layout):
            if own is not None and self.carries(own, axis):
                return dim
        return None

    def carries(self, own: Axis, axis: Axis) -> bool:
        """Whether an axis is another one, or made of it among others."""
        same = self.axes.find(own) == self.axes.find(axis)
        return same or any(self.carries(part, axis) for part, _ in self.axes.parts(own))

    def _of_parts(self, value: Value, shape: Sequence[int], axis: Axis) -> Tensor | None:
        """Put the index together where the parts of an axis have dimensions of their own."""
        total: Tensor | None = None
        for part, size in self.axes.parts(axis):
            inner = self.indices(value, shape, part)
            if inner is None:
                return None
            total = inner if total is None else total * self._number(size) + inner
        return total

    def _along(self, own: Axis, length: int, axis: Axis) -> Tensor | None:
        """Return the index along `axis` for each index of a dimension."""
        if self.axes.find(own) == self.axes.find(axis):
            return torch.arange(length)
        stride = 1
        for part, extent in reversed(self.axes.parts(own)):
            size = self._number(extent)
            if (inner := self._along(part, size, axis)) is not None:
                return inner[torch.arange(length) // stride % size]
            stride *= size
        return None

    def _number(self, extent: Extent) -> int:
        return extent if isinstance(extent, int) else int(extent.subs(self.sizes))


@dataclass(frozen=True)
class Shard:
    """A contiguous part of an axis.

    Attributes:
        begin: Its first index.
        end: One past its last index.
    """

    begin: int
    end: int

    def has(self, indices: Tensor) -> Tensor:
        """Return where indices fall into the shard."""
        return (indices >= self.begin) & (indices < self.end)

    def select(self, whole: Tensor, indices: Tensor, others: Tensor) -> Tensor:
        """Keep the facts of the shard, and take all others from `others`."""
        return torch.where(self.has(indices).to(whole.device), whole, others)


def shards_of(size: int, count: int) -> list[Shard]:
    """Cut an axis into `count` shards whose sizes differ by one at most; fewer where it is shorter."""
    count = min(size, count)
    bounds = [size * place // count for place in range(count + 1)]
    return [Shard(begin, end) for begin, end in pairwise(bounds)]
