"""The CALM report: per axis, what runs shard by shard, where shards wait for each other, and what that moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bwsk_fx.rules.axis import Behaviour

if TYPE_CHECKING:
    from rich.console import RenderableType

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
class NodeReport:
    """One node with what it does on each of its axes.

    Attributes:
        node: The node's name.
        target: What it calls.
        facts: What it does, axis by axis.
    """

    node: str
    target: str
    facts: tuple[AxisFact, ...]


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
class AxisReport:
    """One axis of the graph.

    Attributes:
        axis: The axis.
        nodes: How many nodes carry it.
        counts: How many of them have each behaviour, the most demanding one where a node has several.
        partitions: The maximal groups of nodes that run on a shard without waiting for another, in graph order. A
            REDUCE closes its group; a BARRIER lies between groups.
        barriers: Where all of the axis is needed.
        reduces: Where partial results are summed.
    """

    axis: str
    nodes: int
    counts: dict[Behaviour, int]
    partitions: tuple[tuple[str, ...], ...]
    barriers: tuple[Coordination, ...]
    reduces: tuple[Coordination, ...]

    @property
    def bytes_per_sample(self) -> int:
        """What all coordination on the axis moves, for one sample of the batch."""
        return sum(point.bytes_per_sample for point in (*self.barriers, *self.reduces))

    @property
    def verdict(self) -> str:
        """The axis in one line."""
        points = [_counted(len(self.partitions), "partition"), _counted(len(self.barriers), "barrier")]
        points[1] += _names(self.barriers)
        return f"{self.axis}: {', '.join(points)}, {len(self.reduces)} REDUCE{_names(self.reduces)}"

    def to_json(self) -> dict[str, Any]:
        """Return the axis as JSON-ready dictionaries."""
        counts = {str(behaviour): count for behaviour, count in self.counts.items()}
        extra = {"counts": counts, "bytes_per_sample": self.bytes_per_sample, "verdict": self.verdict}
        return asdict(self) | extra


@dataclass(frozen=True)
class CalmReport:
    """Which parts of a graph run without coordination, along each of its axes.

    Attributes:
        axes: The axes, in the order in which the graph meets them.
        nodes: Every node with its behaviour on each axis.
        unknown: Nodes without an axis rule, which count as barriers.
        published_score: The study's "CALM score", its S-ratio; None unless the graph is typed by the `published`
            ruleset.
    """

    axes: tuple[AxisReport, ...]
    nodes: tuple[NodeReport, ...]
    unknown: tuple[str, ...]
    published_score: float | None = None

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

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready dictionaries."""
        contents: dict[str, Any] = {
            "axes": [axis.to_json() for axis in self.axes],
            "nodes": [asdict(node) for node in self.nodes],
            "unknown": list(self.unknown),
        }
        return contents if self.published_score is None else contents | {"published_score": self.published_score}

    def __str__(self) -> str:
        return "\n".join([*(axis.verdict for axis in self.axes), *self._remarks()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(self._table(), *(Text(remark) for remark in self._remarks()))

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table

        table = Table(title="CALM", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("axis", "nodes", *Behaviour, "partitions", "moved/sample"):
            table.add_column(heading, justify="left" if heading == "axis" else "right", no_wrap=True)
        for axis in self.axes:
            counts = (str(axis.counts[behaviour]) for behaviour in Behaviour)
            table.add_row(axis.axis, str(axis.nodes), *counts, str(len(axis.partitions)), _size(axis.bytes_per_sample))
        return table

    def _remarks(self) -> Iterator[str]:
        if self.unknown:
            yield f"no axis rule, counted as barriers: {', '.join(self.unknown)}"
        if self.published_score is not None:
            yield f"published CALM score (S-ratio): {self.published_score:.1%}"


def strictest(facts: tuple[AxisFact, ...]) -> dict[str, Behaviour]:
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


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(points: tuple[Coordination, ...]) -> str:
    if not points:
        return ""
    shown = [point.node for point in points[:_NAMED]]
    return f" ({', '.join(shown)}{', …' if len(points) > _NAMED else ''})"


def _size(count: float) -> str:
    if not count:
        return "0"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
