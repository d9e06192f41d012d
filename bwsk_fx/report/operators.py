"""A typed graph operator by operator, and where it erases most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bwsk_fx.report.records import NodeRecord
from bwsk_fx.report.render import Printable
from bwsk_fx.report.tables import amount, place, plain_table
from bwsk_fx.verdict import Label

if TYPE_CHECKING:
    from rich.table import Table

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def any_number(path: str) -> str:
    """Return a module's path with `*` for the numbers of blocks."""
    return _NUMBER.sub("*", path)


@dataclass(frozen=True)
class OperatorRow:
    """The counted nodes of one operator.

    Attributes:
        operator: What people call it.
        s: Number of S nodes.
        k: Number of K nodes.
        gray: Number of GRAY nodes.
        erased_elements: Elements per sample that they erase, where their rules know.
        erased_bits: Bits per sample that they erase of elements that survive otherwise, where their rules know.
        unmeasured: Number of K nodes whose rule does not know how much they erase.
    """

    operator: str
    s: int
    k: int
    gray: int
    erased_elements: float
    erased_bits: float
    unmeasured: int


@dataclass(frozen=True)
class OperatorReport(Printable):
    """The operators of a graph, those that erase first; prints with `rich`, and as plain text with `str`."""

    rows: tuple[OperatorRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return JSON-ready dictionaries."""
        return [asdict(row) for row in self.rows]

    def __rich__(self) -> Table:
        """Render a row per operator."""
        table = plain_table(
            "per operator, erased per sample", ("operator", "S", "K", "GRAY", "elements", "bits"), ("operator",)
        )
        for row in self.rows:
            counts = (str(count) for count in (row.s, row.k, row.gray))
            elements = f"{amount(row.erased_elements)}{' + unknown' if row.unmeasured else ''}".removeprefix(" + ")
            table.add_row(row.operator, *counts, elements, amount(row.erased_bits))
        return table


@dataclass(frozen=True)
class HotSpot:
    """K nodes that do the same in every repeated block.

    Attributes:
        module: Path of the module around them, with `*` for the numbers of blocks.
        operator: What they call.
        nodes: Their names.
        erased_elements: Elements per sample that all of them erase.
        erased_bits: Bits per sample that all of them erase of elements that survive otherwise.
        erased_bytes: Both as bytes, elements at the size of what the nodes read.
        share: Part of what the whole graph erases, in bytes.
        rationale: Why the first one is K.
        source: `file:line` of the model's code.
    """

    module: str
    operator: str
    nodes: tuple[str, ...]
    erased_elements: float
    erased_bits: float
    erased_bytes: float
    share: float
    rationale: str
    source: str


@dataclass(frozen=True)
class HotSpots(Printable):
    """Where a graph erases most; prints with `rich`, and as plain text with `str`.

    Attributes:
        spots: The largest first.
        left_out: How many others there are.
        unmeasured: Number of K nodes whose rule does not know how much they erase; they are no spots.
    """

    spots: tuple[HotSpot, ...]
    left_out: int = 0
    unmeasured: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        return asdict(self)

    def __rich__(self) -> Table:
        """Render a row per spot."""
        headings = ("share", "where", "nodes", "elements", "bits")
        table = plain_table("where most is erased per sample", headings, ("where",))
        for spot in self.spots:
            amounts = (str(len(spot.nodes)), amount(spot.erased_elements), amount(spot.erased_bits))
            table.add_row(f"{spot.share:.1%}", place(spot.module, spot.operator, spot.source), *amounts)
        notes = [f"{self.left_out} more"] if self.left_out else []
        notes += [f"{self.unmeasured} K nodes of unknown amount"] if self.unmeasured else []
        table.caption, table.caption_justify = "; ".join(notes) or None, "left"
        return table


def by_operator(nodes: Iterable[NodeRecord]) -> OperatorReport:
    """Add up the counted nodes of each operator."""
    groups: dict[str, list[NodeRecord]] = {}
    for node in nodes:
        if node.counted:
            groups.setdefault(node.operator, []).append(node)
    rows = [_row(operator, members) for operator, members in groups.items()]
    return OperatorReport(tuple(sorted(rows, key=lambda row: (-row.k - row.gray, -row.s, row.operator))))


def hot_spots(nodes: Sequence[NodeRecord], top: int) -> HotSpots:
    """Find the counted K nodes that erase most.

    Args:
        nodes: The nodes of a graph; shares are of what these erase.
        top: How many to keep.
    """
    known = {node.name: node for node in nodes}
    erasing = [node for node in nodes if node.counted and node.label is Label.K]
    weights = {node.name: _erased_bytes(node, known) for node in erasing if node.measured}
    groups: dict[tuple[str, str, str], list[NodeRecord]] = {}
    for node in erasing:
        if weights.get(node.name):
            groups.setdefault((any_number(node.module), node.operator, node.source), []).append(node)
    total = sum(weights.values())
    spots = [_spot(*key, members, weights, total) for key, members in groups.items()]
    spots.sort(key=lambda spot: -spot.erased_bytes)
    unmeasured = sum(not node.measured for node in erasing)
    return HotSpots(tuple(spots[:top]), max(len(spots) - top, 0), unmeasured)


def _row(operator: str, nodes: Sequence[NodeRecord]) -> OperatorRow:
    labels = [node.label for node in nodes]
    return OperatorRow(
        operator,
        labels.count(Label.S),
        labels.count(Label.K),
        labels.count(Label.GRAY),
        sum(node.erased_elements or 0 for node in nodes),
        sum(node.erased_bits or 0 for node in nodes),
        sum(node.label is Label.K and not node.measured for node in nodes),
    )


def _spot(
    module: str,
    operator: str,
    source: str,
    nodes: Sequence[NodeRecord],
    weights: dict[str, float],
    total: float,
) -> HotSpot:
    size = sum(weights[node.name] for node in nodes)
    return HotSpot(
        module,
        operator,
        tuple(node.name for node in nodes),
        sum(node.erased_elements or 0 for node in nodes),
        sum(node.erased_bits or 0 for node in nodes),
        size,
        size / total,
        nodes[0].rationale,
        source,
    )


def _erased_bytes(node: NodeRecord, known: dict[str, NodeRecord]) -> float:
    read = [known[name] for name in node.inputs if name in known and known[name].dynamic and known[name].dtypes]
    dtype = read[0].dtypes[0] if read else node.dtypes[0]
    return (node.erased_elements or 0) * getattr(torch, dtype).itemsize + (node.erased_bits or 0) / 8
