"""In which forms each node of a graph can run on several devices, read off what it claims of its axes.

Each node runs on shards of one axis of its own, or on all of it on every device (replicated). A tensor is therefore
replicated, sharded along an axis, or partial (each device has a summand).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bwsk_fx.blocks import block_of
from bwsk_fx.calm_backward import Backward, reindexed
from bwsk_fx.calm_cost import Cost, Operation, axis_size, has
from bwsk_fx.rules.axis import Behaviour, Claim, Value
from bwsk_fx.rules.axis_table import Axis, AxisTable, Extent

# The form of a tensor: a number from 0 on is the axis that it is sharded along.
REPLICATED, PARTIAL = -1, -2
_UNNAMED = "unnamed"


@dataclass(frozen=True)
class Need:
    """What a node needs of one operand.

    Attributes:
        task: Which node computes the operand.
        form: The form that it has to have.
        gradient: The form that its gradient comes back in.
    """

    task: int
    form: int
    gradient: int


@dataclass(frozen=True)
class Choice:
    """One way to run a node.

    Attributes:
        axis: The name of the axis that it is sharded along; empty for replicated.
        needs: What it needs of its operands.
        result: The form of its result.
        sizes: What has to be divisible by the number of devices.
        gradients: The parameters of whose gradients each device has a summand, with their bytes.
        gathered: The bytes per sample that are gathered inside, and whose gradients are scattered.
    """

    axis: str
    needs: tuple[Need, ...]
    result: int
    sizes: tuple[Extent, ...] = ()
    gradients: tuple[tuple[str, int], ...] = ()
    gathered: int = 0


@dataclass(frozen=True)
class Task:
    """One node with the ways to run it.

    Attributes:
        name: The node's name.
        block: The repeated block that it belongs to; empty for none.
        choices: The ways to run it, replicated first.
        tensors: Shape and bytes per element of each result.
        learns: Whether a gradient flows back through it.
        cost: Its FLOPs and bytes.
        users: The tasks that use its result.
    """

    name: str
    block: str
    choices: tuple[Choice, ...]
    tensors: tuple[tuple[tuple[Extent, ...], int], ...]
    learns: bool
    cost: Cost
    users: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """All that choosing axes takes, without the graph that it came from.

    Attributes:
        tasks: The nodes, in order.
        extents: The sizes that each axis name stands for.
    """

    tasks: tuple[Task, ...]
    extents: tuple[tuple[str, tuple[Extent, ...]], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Problem:
        return self


def sharding_problem(operations: Sequence[Operation], backward: Backward) -> Problem:
    """Return what choosing axes for the operations of a graph takes."""
    users: list[list[int]] = [[] for _ in operations]
    for operation in operations:
        for source in {source for source, _ in operation.sources}:
            users[source].append(operation.index)
    tasks = tuple(
        Task(
            operation.name,
            block_of(operation.step.node) or "",
            tuple(_Choices(operation, operations, backward).all()),
            tuple((value.shape, value.itemsize) for value in operation.step.results),
            operation.learns,
            backward.trials.cost(operation),
            tuple(users[operation.index]),
        )
        for operation in operations
    )
    return Problem(tasks, tuple(_extents(operations, backward.axes)))


def _extents(operations: Sequence[Operation], axes: AxisTable) -> Iterator[tuple[str, tuple[Extent, ...]]]:
    found: dict[str, dict[Extent, None]] = {}
    for operation in operations:
        for value in operation.step.results:
            for axis in axes.atoms(value.layout):
                if name := axes.name(axis):
                    found.setdefault(name, {})[axis_size(value, axis, axes)] = None
    yield from ((name, tuple(sizes)) for name, sizes in found.items())


@dataclass(frozen=True)
class _Choices:
    """Reads off the claims of an operation in which forms it can run."""

    operation: Operation
    operations: Sequence[Operation]
    backward: Backward

    def all(self) -> Iterator[Choice]:
        yield Choice("", tuple(Need(source, REPLICATED, REPLICATED) for source, _ in self._sources), REPLICATED)
        for claim in dict.fromkeys(self.operation.step.claims):
            if claim.behaviour is not Behaviour.BARRIER:
                yield from self._of(claim)

    @property
    def _axes(self) -> AxisTable:
        return self.backward.axes

    @property
    def _sources(self) -> list[tuple[int, Value]]:
        return list(dict.fromkeys(self.operation.sources))

    def _of(self, claim: Claim) -> Iterator[Choice]:
        axis, partners = claim.axis, reindexed(self.operation.step, claim, self._axes)
        if claim.consumed and claim.produced:
            yield self._choice(claim, axis, axis, gathered=self._gathered(axis))
        elif claim.consumed and not partners:
            yield self._choice(claim, axis, None)
        elif claim.produced and not partners:
            yield self._choice(claim, None, axis)
        elif claim.produced:
            yield from (self._choice(claim, other, axis) for other in partners if self._keeps_shards(other, axis))

    def _choice(self, claim: Claim, inner: Axis | None, outer: Axis | None, gathered: int = 0) -> Choice:
        needs = tuple(self._need(source, value, inner) for source, value in self._sources)
        lacking = self.backward.lacking_weights(self.operation, claim) if self.operation.learns else ()
        return Choice(
            self._axes.name(claim.axis) or _UNNAMED,
            needs,
            PARTIAL if outer is None else self._form(outer),
            tuple(self._sizes(inner, outer)),
            tuple((weight.name, weight.bytes) for weight in lacking),
            gathered,
        )

    def _need(self, source: int, value: Value, axis: Axis | None) -> Need:
        if axis is not None and has(value.layout, axis, self._axes):
            return Need(source, self._form(axis), self._form(axis))
        return Need(source, REPLICATED, PARTIAL if self.operations[source].learns else REPLICATED)

    def _form(self, axis: Axis) -> int:
        """Return the form of a tensor that is sharded along an axis: shards of its outermost part are the same."""
        *_, outermost = _outermost(axis, self._axes)
        return outermost.uid

    def _sizes(self, inner: Axis | None, outer: Axis | None) -> Iterator[Extent]:
        step = self.operation.step
        for axis, values in ((inner, step.inputs), (outer, step.results)):
            if axis is not None:
                sizes = (axis_size(value, axis, self._axes) for value in values)
                yield from dict.fromkeys(size for size in sizes if size is not None)

    def _gathered(self, axis: Axis) -> int:
        """Return what a BARRIER on the same axis gathers, as attention gathers keys and values for its queries."""
        waits = [claim for claim in self.operation.step.claims if claim.axis == axis]
        waits = [claim for claim in waits if claim.behaviour is Behaviour.BARRIER]
        whole = sum(value.bytes_per_sample for _, value in self._sources if has(value.layout, axis, self._axes))
        return sum(whole if claim.moved is None else claim.moved for claim in waits)

    def _keeps_shards(self, inner: Axis, outer: Axis) -> bool:
        """Whether equal shards of one axis are equal shards of the other: outermost parts, and even cuts."""
        if self._form(inner) == self._form(outer):
            return True
        results = self.operation.step.results
        even = len(results) > 1 and len({value.shape for value in results}) == 1
        return even and self._axes.origins(outer) == (inner,)


def _outermost(axis: Axis, axes: AxisTable) -> Iterator[Axis]:
    """Yield an axis and the parts of it whose shards are contiguous shards of it."""
    while True:
        yield (axis := axes.find(axis))
        if not axes.parts(axis):
            return
        axis = axes.parts(axis)[0][0]
