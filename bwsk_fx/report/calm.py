"""The CALM report: per axis, what runs shard by shard, where shards wait for each other, and what that moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk_fx.errors import RuleError
from bwsk_fx.report.render import Printable, wrapped
from bwsk_fx.rules.axis import Behaviour

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bwsk_fx.calm_choices import Problem
    from bwsk_fx.calm_order import Order
    from bwsk_fx.report.calm_sharding import Sharding

_NAMED = 3


@dataclass(frozen=True)
class AxisFact:
    """What one node does on one axis, as `node.meta["calm"]` carries it.

    Attributes:
        axis: The axis.
        behaviour: MAP, JOIN, REDUCE or BARRIER.
        reason: One sentence.
        role: Which part the axis plays where the node has several of one name; else empty.
        bytes_per_sample: What coordination moves, for one sample of the batch; 0 where there is none.
    """

    axis: str
    behaviour: Behaviour
    reason: str
    role: str = ""
    bytes_per_sample: int = 0


@dataclass(frozen=True)
class BackwardFact:
    """What the backward pass of one node does on one axis.

    Attributes:
        axis: The axis.
        behaviour: MAP, REDUCE or BARRIER.
        reason: One sentence.
        gradient: The parameter or the node of whose gradient each shard has a partial sum; else empty.
        parameter: Whether that is a parameter.
        bytes: What completes the gradient: the size of the parameter, or of the activation for one sample.
    """

    axis: str
    behaviour: Behaviour
    reason: str
    gradient: str = ""
    parameter: bool = False
    bytes: int = 0


@dataclass(frozen=True)
class NodeReport:
    """One node with what it does on each of its axes.

    Attributes:
        node: The node's name.
        target: What it calls.
        facts: What it does, axis by axis.
        backward: What its backward pass does; empty where no gradient flows.
        block: The repeated block that it belongs to, such as `"vit.layers.3"`; empty for none.
    """

    node: str
    target: str
    facts: tuple[AxisFact, ...]
    backward: tuple[BackwardFact, ...] = ()
    block: str = ""


@dataclass(frozen=True)
class GradientReduce:
    """A gradient that shards of an axis have partial sums of, and that one all-reduce completes.

    Attributes:
        gradient: The parameter, or the node whose result it is the gradient of.
        parameter: Whether it is a parameter.
        bytes: Its size; for the gradient of a node's result, for one sample of the batch.
        nodes: The nodes whose backward passes contribute.
    """

    gradient: str
    parameter: bool
    bytes: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Coordination:
    """A node at which the shards of an axis have to wait for each other.

    Attributes:
        node: The node's name.
        target: What it calls.
        behaviour: BARRIER or REDUCE.
        reason: One sentence.
        bytes_per_sample: What is moved, for one sample of the batch.
    """

    node: str
    target: str
    behaviour: Behaviour
    reason: str
    bytes_per_sample: int


@dataclass(frozen=True)
class AxisReport(Printable):
    """One axis of the graph.

    Attributes:
        axis: The axis.
        nodes: How many nodes carry it.
        counts: How many of them have each behaviour, the most demanding one where a node has several.
        partitions: The maximal groups of nodes that run on a shard without waiting for another, in graph order. A
            REDUCE closes its group; a BARRIER lies between groups.
        barriers: Where all of the axis is needed.
        reduces: Where partial results are summed.
        backward_counts: How many nodes have a backward pass of each behaviour, the most demanding one where several.
        gradients: The gradients that are summed over shards in the backward pass, each once.
    """

    axis: str
    nodes: int
    counts: dict[Behaviour, int]
    partitions: tuple[tuple[str, ...], ...]
    barriers: tuple[Coordination, ...]
    reduces: tuple[Coordination, ...]
    backward_counts: dict[Behaviour, int] = field(default_factory=dict)
    gradients: tuple[GradientReduce, ...] = ()

    @property
    def bytes_per_sample(self) -> int:
        """What all coordination on the axis moves, for one sample of the batch."""
        return sum(point.bytes_per_sample for point in (*self.barriers, *self.reduces))

    @property
    def parameter_gradient_bytes(self) -> int:
        """What the reductions of parameters' gradients sum up, once per step whatever the batch."""
        return sum(each.bytes for each in self.gradients if each.parameter)

    @property
    def activation_gradient_bytes(self) -> int:
        """What the reductions of other gradients sum up, for one sample of the batch."""
        return sum(each.bytes for each in self.gradients if not each.parameter)

    @property
    def backward_verdict(self) -> str:
        """The backward pass in one line."""
        parameters = sum(each.parameter for each in self.gradients)
        sums = [
            (parameters, "parameter gradient", self.parameter_gradient_bytes, "step"),
            (len(self.gradients) - parameters, "activation gradient", self.activation_gradient_bytes, "sample"),
        ]
        parts = [counted(self.backward_counts.get(Behaviour.BARRIER, 0), "barrier")]
        parts += [
            f"{counted(count, noun)} to sum" + (f" ({size_text(size)} per {unit})" if count else "")
            for count, noun, size, unit in sums
        ]
        return f"{self.axis}, backward: {', '.join(parts)}"

    @property
    def verdict(self) -> str:
        """The axis in one line."""
        points = [counted(len(self.partitions), "partition"), counted(len(self.barriers), "barrier")]
        points[1] += _names(self.barriers)
        return f"{self.axis}: {', '.join(points)}, {len(self.reduces)} REDUCE{_names(self.reduces)}"

    def __rich__(self) -> RenderableType:
        from bwsk_fx.report.calm_tables import axis_tables

        return axis_tables(self)

    def to_json(self) -> dict[str, Any]:
        """Return the axis as JSON-ready dictionaries."""
        counts = {str(behaviour): count for behaviour, count in self.counts.items()}
        backward = {str(behaviour): count for behaviour, count in self.backward_counts.items()}
        extra = {
            "counts": counts,
            "bytes_per_sample": self.bytes_per_sample,
            "verdict": self.verdict,
            "backward_counts": backward,
            "parameter_gradient_bytes": self.parameter_gradient_bytes,
            "activation_gradient_bytes": self.activation_gradient_bytes,
            "backward_verdict": self.backward_verdict,
        }
        return asdict(self) | extra


@dataclass(frozen=True)
class CalmReport(Printable):
    """Which parts of a graph run without coordination, along each of its axes.

    Attributes:
        axes: The axes, in the order in which the graph meets them.
        nodes: Every node with its behaviour on each axis.
        unknown: Nodes without an axis rule, which count as barriers.
        published_score: The study's "CALM score", its S-ratio; None unless the graph is typed by the `published`
            ruleset.
        order: What the partial order of the nodes allows on one device.
        problem: What choosing axes for several devices takes; not part of the JSON.
    """

    axes: tuple[AxisReport, ...]
    nodes: tuple[NodeReport, ...]
    unknown: tuple[str, ...]
    published_score: float | None = None
    order: Order | None = None
    problem: Problem | None = field(default=None, compare=False, repr=False)

    def sharding(self, devices: int, batch: int | None = None) -> Sharding:
        """Return the sequence of axes with which a training step on several devices sends the fewest bytes.

        Args:
            devices: How many devices, at least 2.
            batch: Samples per step on all devices together; one per device if None.

        Raises:
            RuleError: Fewer than two devices or no sample; or the report does not come from `analyze_calm`.
        """
        if self.problem is None:
            raise RuleError("this report has no costs to choose axes by; take the one that analyze_calm returns")
        from bwsk_fx.calm_sharding import solve

        return solve(self.problem, devices, batch)

    def axis(self, name: str) -> AxisReport:
        """Return one axis.

        Raises:
            KeyError: The graph has no such axis.
        """
        for report in self.axes:
            if report.axis == name:
                return report
        raise KeyError(f"no axis '{name}'; the graph has {', '.join(report.axis for report in self.axes)}")

    def node(self, name: str) -> NodeReport:
        """Return one node.

        Raises:
            KeyError: No node of this name carries an axis.
        """
        for report in self.nodes:
            if report.node == name:
                return report
        raise KeyError(f"no node '{name}' carries an axis")

    def save_svg(self, path: str | Path) -> None:
        """Write a picture of the partitions: a row per axis, a column per node, repeated blocks once.

        Args:
            path: The file, which is overwritten. It refers to nothing outside itself.

        Raises:
            OSError: The file cannot be written.
        """
        from bwsk_fx.report.calm_picture import picture

        Path(path).write_text(picture(self), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready dictionaries."""
        contents: dict[str, Any] = {
            "axes": [axis.to_json() for axis in self.axes],
            "nodes": [asdict(node) for node in self.nodes],
            "unknown": list(self.unknown),
        }
        if self.order is not None:
            contents["order"] = self.order.to_json()
        return contents if self.published_score is None else contents | {"published_score": self.published_score}

    def __str__(self) -> str:
        backward = (axis.backward_verdict for axis in self.axes if any(axis.backward_counts.values()))
        return wrapped([*(axis.verdict for axis in self.axes), *backward, *self._remarks()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from bwsk_fx.report.calm_tables import backward_table, forward_table

        return Group(forward_table(self), "", backward_table(self), "", *(Text(remark) for remark in self._remarks()))

    def _remarks(self) -> Iterator[str]:
        from bwsk_fx.report.calm_tables import order_lines

        if self.order is not None:
            yield from order_lines(self.order)
        if self.unknown:
            calls = counted(len(self.unknown), "call")
            yield f"{calls} without an axis rule, counted as barriers: {', '.join(self.unknown)}"
        if self.published_score is not None:
            yield f"published CALM score (S-ratio): {self.published_score:.1%}"


def strictest(facts: Sequence[AxisFact | BackwardFact]) -> dict[str, Behaviour]:
    """Return the most demanding behaviour per axis."""
    order = list(Behaviour)
    found: dict[str, Behaviour] = {}
    for fact in facts:
        found[fact.axis] = max(found.get(fact.axis, Behaviour.MAP), fact.behaviour, key=order.index)
    return found


def behaviour_counts(behaviours: list[Behaviour]) -> dict[Behaviour, int]:
    """Return how often each behaviour occurs, the absent ones as zero."""
    counts = Counter(behaviours)
    return {behaviour: counts[behaviour] for behaviour in Behaviour}


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(points: tuple[Coordination, ...]) -> str:
    if not points:
        return ""
    shown = [point.node for point in points[:_NAMED]]
    return f" ({', '.join(shown)}{', …' if len(points) > _NAMED else ''})"


def size_text(count: float) -> str:
    """Return bytes in the unit that suits them."""
    if not count:
        return "0"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
