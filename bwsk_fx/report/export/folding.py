"""Typed graphs for drawing: one box per module, or per node, and what flows between boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from bwsk_fx.errors import RuleError
from bwsk_fx.report.records import NodeRecord
from bwsk_fx.verdict import Label

TOP_LEVEL = "(top level)"


@dataclass(frozen=True)
class Box:
    """A run of neighbouring nodes of one module.

    Attributes:
        module: Path of the module, cut at the depth; empty for what the model's own forward method calls.
        nodes: Its nodes, in execution order.
    """

    module: str
    nodes: tuple[NodeRecord, ...]

    @cached_property
    def title(self) -> str:
        """The module, or of a single node what it calls as well."""
        if len(self.nodes) > 1:
            return self.module or TOP_LEVEL
        (node,) = self.nodes
        if node.op in ("placeholder", "output"):
            return node.name
        return " ".join(part for part in (node.module, node.operator) if part)

    @cached_property
    def counts(self) -> dict[Label, int]:
        """How many counted nodes have each label, without those that none has."""
        found = Counter(node.label for node in self.nodes if node.counted)
        return {label: found[label] for label in Label if found[label]}

    @cached_property
    def erased(self) -> str:
        """What its K nodes erase per sample, in words."""
        sums = {
            "elements": sum(node.erased_elements or 0 for node in self.nodes if node.counted),
            "bits": sum(node.erased_bits or 0 for node in self.nodes if node.counted),
        }
        words = [f"{amount:,.0f} {unit}" for unit, amount in sums.items() if amount]
        return f"erases {' and '.join(words)}" if words else ""

    @cached_property
    def contents(self) -> str:
        """Its counts, in words."""
        return ", ".join(f"{count} {label}" for label, count in self.counts.items())


@dataclass(frozen=True)
class Folded:
    """Boxes, and from which to which values flow, by their places among the boxes."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def fold(records: Sequence[NodeRecord], depth: int | None) -> Folded:
    """Gather neighbouring nodes that share the first parts of their module's path.

    Attributes, sizes and static values are left out. A module that runs twice, with others in between, is there twice:
    so no path leads from a box to itself.

    Args:
        records: All nodes of a graph.
        depth: The number of parts; None for a box per node.

    Raises:
        RuleError: The depth is negative.
    """
    if depth is not None and depth < 0:
        raise RuleError(f"depth is {depth}; it is the number of parts of a module's path that are shown, at least 0")
    drawn = [record for record in records if record.dynamic or record.op == "output"]
    boxes = tuple(_boxes(drawn, depth))
    place = {node.name: index for index, box in enumerate(boxes) for node in box.nodes}
    known = {record.name: record for record in records}
    edges = {
        (place[source], place[node.name]): None
        for node in drawn
        for source in (_gathered(node, known, place) if node.op == "output" else node.inputs)
        if source in place and place[source] != place[node.name]
    }
    return Folded(boxes, tuple(edges))


def _boxes(drawn: Iterable[NodeRecord], depth: int | None) -> Iterator[Box]:
    def key(numbered: tuple[int, NodeRecord]) -> Hashable:
        place, node = numbered
        alone = depth is None or node.op in ("placeholder", "output")
        return (place, "") if alone else (-1, _cut(node.module, depth))

    for _, run in groupby(enumerate(drawn), key):
        nodes = tuple(node for _, node in run)
        yield Box(nodes[0].module if depth is None else _cut(nodes[0].module, depth), nodes)


def _gathered(output: NodeRecord, known: Mapping[str, NodeRecord], place: Mapping[str, int]) -> Iterator[str]:
    """Yield the drawn nodes whose values are returned, in whatever they are packed."""
    waiting = list(output.inputs)
    while waiting:
        name = waiting.pop(0)
        if name in place:
            yield name
        else:
            waiting += known[name].inputs


def _cut(path: str, depth: int | None) -> str:
    return ".".join(path.split(".")[:depth]) if path else ""
