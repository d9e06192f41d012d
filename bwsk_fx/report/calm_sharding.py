"""The sharding report: which axis each part of a training step is sharded along, and what its devices send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bwsk_fx.report.calm import size_text
from bwsk_fx.report.render import Printable, wrapped

if TYPE_CHECKING:
    from rich.console import RenderableType

_BACKWARD_WORK = 2
_NAME = 36
REPLICATED = "replicated"


@dataclass(frozen=True)
class Placement:
    """One node with the axis that it is sharded along.

    Attributes:
        node: The node's name.
        block: The repeated block that it belongs to; empty for none.
        axis: The axis; empty where every device does all of it.
        flops: Its floating-point operations forward, for the whole batch.
        bytes: What it reads and writes.
    """

    node: str
    block: str
    axis: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Collective:
    """One collective operation of a training step.

    Attributes:
        kind: all-reduce, reduce-scatter, all-gather or all-to-all.
        tensor: The node whose result, or the parameter whose gradient is sent.
        user: The node that needs it, forward, or that the gradient comes from.
        direction: forward or backward.
        bytes: The size of the whole tensor.
        sent: What each device sends.
        parameter: Whether it is the gradient of a parameter.
    """

    kind: str
    tensor: str
    user: str
    direction: str
    bytes: int
    sent: float
    parameter: bool = False


@dataclass(frozen=True)
class AxisSize:
    """The sizes of the axes of one name.

    Attributes:
        axis: The name.
        sizes: The sizes, each once.
        divisible: Whether the number of devices divides all of them.
    """

    axis: str
    sizes: tuple[int, ...]
    divisible: bool


@dataclass(frozen=True)
class Stretch:
    """Neighbouring nodes that are all sharded, or all replicated, with nothing sent in between.

    Attributes:
        axes: The axes, in the order in which they come up; empty for replicated.
        nodes: The nodes.
        forward: What each device sends where the stretch begins, or inside, forward.
        backward: The same for the backward pass, gradients of parameters included.
    """

    axes: tuple[str, ...]
    nodes: tuple[str, ...]
    forward: float
    backward: float

    @property
    def words(self) -> str:
        """The axes in words."""
        return ", ".join(self.axes) or REPLICATED


@dataclass(frozen=True)
class Sharding(Printable):
    """The sequence of axes with which a training step on several devices sends the fewest bytes.

    Attributes:
        devices: How many devices.
        batch: Samples per step on all of them together.
        placements: Every node with its axis, in order.
        collectives: What is sent.
        axes: The sizes of each axis, and whether `devices` divides them.
        exact: Whether no other assignment sends less; False where the search had to drop some.
    """

    devices: int
    batch: int
    placements: tuple[Placement, ...]
    collectives: tuple[Collective, ...]
    axes: tuple[AxisSize, ...]
    exact: bool

    @property
    def forward_bytes(self) -> float:
        """What each device sends in the forward pass."""
        return sum(each.sent for each in self.collectives if each.direction == "forward")

    @property
    def backward_bytes(self) -> float:
        """What each device sends in the backward pass, gradients of parameters included."""
        return sum(each.sent for each in self.collectives if each.direction == "backward")

    @property
    def parameter_bytes(self) -> float:
        """What each device sends to sum gradients of parameters."""
        return sum(each.sent for each in self.collectives if each.parameter)

    @property
    def total_bytes(self) -> float:
        """What each device sends per step."""
        return self.forward_bytes + self.backward_bytes

    @property
    def flops_per_device(self) -> float:
        """Forward and backward FLOPs of one device; a backward pass counts as twice its forward pass."""
        shares = (place.flops / (self.devices if place.axis else 1) for place in self.placements)
        return (1 + _BACKWARD_WORK) * sum(shares)

    def axis_of(self, node: str) -> str:
        """Return the axis that a node is sharded along; empty for replicated.

        Raises:
            KeyError: There is no such node.
        """
        for place in self.placements:
            if place.node == node:
                return place.axis
        raise KeyError(f"no node '{node}' in the sharding")

    def seconds(self, bandwidth: float, flops: float) -> tuple[float, float]:
        """Return the time that a step computes and the time that it sends, if neither hides the other.

        Args:
            bandwidth: Bytes per second that one device sends.
            flops: Floating-point operations per second that one device does.
        """
        return self.flops_per_device / flops, self.total_bytes / bandwidth

    @property
    def sequence(self) -> tuple[Stretch, ...]:
        """The axes in the order of the nodes."""
        return tuple(_stretches(self.placements, self.collectives))

    def to_json(self) -> dict[str, Any]:
        """Return the sharding as JSON-ready dictionaries."""
        totals = ("forward_bytes", "backward_bytes", "parameter_bytes", "total_bytes", "flops_per_device")
        return {
            **asdict(self),
            **{name: getattr(self, name) for name in totals},
            "sequence": [asdict(stretch) for stretch in self.sequence],
        }

    def __str__(self) -> str:
        lines = [f"{stretch.words}: {stretch.nodes[0]} … {stretch.nodes[-1]}" for stretch in self.sequence]
        return wrapped([*lines, self._total()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(self._table(), *(Text(remark) for remark in self._remarks()))

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table

        title = f"{self.devices} devices, {self.batch} samples per step"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("axis", no_wrap=True)
        table.add_column("from", overflow="ellipsis", no_wrap=True, max_width=_NAME)
        for heading in ("nodes", "times", "sent forward", "backward"):
            table.add_column(heading, justify="right", no_wrap=True)
        for times, cycle in folded(self.sequence):
            for stretch in cycle:
                sent = (size_text(times * moved) for moved in (stretch.forward, stretch.backward))
                table.add_row(stretch.words, stretch.nodes[0], str(len(stretch.nodes)), str(times), *sent)
        return table

    def _remarks(self) -> Iterator[str]:
        yield self._total()
        uneven = [f"{axis.axis} ({', '.join(map(str, axis.sizes))})" for axis in self.axes if not axis.divisible]
        if uneven:
            yield f"not all sizes divisible by {self.devices}: {', '.join(uneven)}"
        if not self.exact:
            yield "too many forms at once: another sequence may send less"

    def _total(self) -> str:
        return (
            f"each device sends {size_text(self.forward_bytes)} forward, {size_text(self.backward_bytes)} backward "
            f"({size_text(self.parameter_bytes)} of it gradients of parameters)"
        )


def folded(sequence: Sequence[Stretch]) -> list[tuple[int, tuple[Stretch, ...]]]:
    """Fold repeated runs of a sequence: equal axes, numbers of nodes and bytes count as equal.

    Returns:
        How often each run comes one after the other, with its first occurrence.
    """
    keys = [(stretch.axes, len(stretch.nodes), stretch.forward, stretch.backward) for stretch in sequence]
    found: list[tuple[int, tuple[Stretch, ...]]] = []
    place = 0
    while place < len(sequence):
        period, times = max(
            ((period, _times(keys, place, period)) for period in range(1, (len(keys) - place) // 2 + 1)),
            key=lambda run: (run[0] * run[1] if run[1] > 1 else 0, -run[0]),
            default=(1, 1),
        )
        period, times = (period, times) if times > 1 else (1, 1)
        found.append((times, tuple(sequence[place : place + period])))
        place += period * times
    return found


def _times(keys: Sequence[Any], place: int, period: int) -> int:
    times = 1
    while keys[place + times * period : place + (times + 1) * period] == keys[place : place + period]:
        times += 1
    return times


def _stretches(placements: Sequence[Placement], collectives: Sequence[Collective]) -> Iterator[Stretch]:
    sent: dict[str, list[Collective]] = {}
    for collective in collectives:
        sent.setdefault(collective.user, []).append(collective)
    # Something that is sent forward begins a stretch.
    begun = 0
    numbered: list[tuple[tuple[bool, int], Placement]] = []
    for place in placements:
        begun += any(each.direction == "forward" and each.tensor != place.node for each in sent.get(place.node, ()))
        numbered.append(((bool(place.axis), begun), place))
    for _, group in groupby(numbered, key=lambda item: item[0]):
        places = [place for _, place in group]
        moved = [each for place in places for each in sent.get(place.node, ())]
        forward = sum(each.sent for each in moved if each.direction == "forward")
        backward = sum(each.sent for each in moved if each.direction == "backward")
        axes = tuple(dict.fromkeys(place.axis for place in places if place.axis))
        yield Stretch(axes, tuple(place.node for place in places), forward, backward)
