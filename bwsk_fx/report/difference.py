"""Two typed graphs set side by side: what only one of them has, and what is labelled differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.report.operators import any_number
from bwsk_fx.report.records import NodeRecord, records
from bwsk_fx.report.render import Printable
from bwsk_fx.report.tables import place, plain_table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

ONLY_A, ONLY_B, VERDICT, AMOUNT = "only in A", "only in B", "verdict differs", "amount differs"
KINDS = (ONLY_A, ONLY_B, VERDICT, AMOUNT)


@dataclass(frozen=True)
class Change:
    """A node of one graph, of the other, or one of each that differ.

    Attributes:
        kind: `only in A`, `only in B`, `verdict differs` or `amount differs`.
        a: The node of graph A, if it has one.
        b: The node of graph B, if it has one.
    """

    kind: str
    a: NodeRecord | None
    b: NodeRecord | None

    @property
    def node(self) -> NodeRecord:
        """The node that there is, that of A first."""
        found = self.a or self.b
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        return {
            "kind": self.kind,
            "module": self.node.module,
            "operator": self.node.operator,
            "a": None if self.a is None else _side(self.a),
            "b": None if self.b is None else _side(self.b),
        }


@dataclass(frozen=True)
class Difference(Printable):
    """How two graphs differ; prints with `rich`, and as plain text with `str`.

    Attributes:
        a: What graph A is called.
        b: What graph B is called.
        same: Number of nodes that both have, with the same verdict and the same amounts.
        changes: The others, in the order of graph A, then those that only B has.
    """

    a: str
    b: str
    same: int
    changes: tuple[Change, ...]

    def of_kind(self, kind: str) -> tuple[Change, ...]:
        """Return the changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        counts = {kind.replace(" ", "_").lower(): len(self.of_kind(kind)) for kind in KINDS}
        return {"a": self.a, "b": self.b, "same": self.same, **counts, "changes": [c.to_json() for c in self.changes]}

    def __rich__(self) -> Group:
        """Render counts, then a row per kind of change; what repeated blocks share has one row."""
        from rich.console import Group
        from rich.markup import escape

        counts = ", ".join(f"{len(self.of_kind(kind))} {kind}" for kind in KINDS)
        headline = f"A: [b]{escape(self.a)}[/b], B: [b]{escape(self.b)}[/b]: {self.same} nodes alike, {counts}"
        return Group(headline, *([self._table()] if self.changes else []))

    def _table(self) -> Table:
        table = plain_table("differences", ("where", "nodes", "A", "B"), ("where", "A", "B"))
        for kind in KINDS:
            groups = Counter(_row(change) for change in self.of_kind(kind))
            if groups:
                table.add_row(f"[b]{kind}[/b]", f"[b]{groups.total()}[/b]")
            for (where, a, b), count in groups.items():
                table.add_row(f"  {where}", str(count), a, b)
        return table


def compare_graphs(a: fx.GraphModule, b: fx.GraphModule, names: tuple[str, str] = ("A", "B")) -> Difference:
    """Compare the counted nodes of two typed graphs.

    Nodes are matched by the path of the module around them and by operator; of several in one module the first is
    matched with the first, and so on.

    Args:
        a: A typed graph.
        b: Another one, typed under the same ruleset.
        names: What they are called.

    Raises:
        RuleError: A graph is not typed.
    """
    for graph in (a, b):
        require_graph(graph)
    pairs = list(_pairs(records(a), records(b)))
    changes = [change for change in (_change(*pair) for pair in pairs) if change is not None]
    return Difference(*names, len(pairs) - len(changes), tuple(changes))


def _pairs(a: Sequence[NodeRecord], b: Sequence[NodeRecord]) -> Iterator[tuple[NodeRecord | None, NodeRecord | None]]:
    ours, theirs = _by_place(a), _by_place(b)
    for key, nodes in ours.items():
        yield from zip_longest(nodes, theirs.pop(key, []))
    for nodes in theirs.values():
        yield from ((None, node) for node in nodes)


def _by_place(nodes: Iterable[NodeRecord]) -> dict[tuple[str, str], list[NodeRecord]]:
    found: dict[tuple[str, str], list[NodeRecord]] = {}
    for node in nodes:
        if node.counted:
            found.setdefault((node.module, node.operator), []).append(node)
    return found


def _change(a: NodeRecord | None, b: NodeRecord | None) -> Change | None:
    if a is None or b is None:
        return Change(ONLY_B if a is None else ONLY_A, a, b)
    if a.label is not b.label:
        return Change(VERDICT, a, b)
    amounts = [(node.erased_elements, node.erased_bits) for node in (a, b)]
    return Change(AMOUNT, a, b) if amounts[0] != amounts[1] else None


def _row(change: Change) -> tuple[str, str, str]:
    node = change.node
    return place(any_number(node.module), node.operator), _words(change.a), _words(change.b)


def _side(node: NodeRecord) -> dict[str, Any]:
    kept = ("name", "erased_elements", "erased_bits", "rationale", "source")
    return {"verdict": str(node.label)} | {name: getattr(node, name) for name in kept}


def _words(node: NodeRecord | None) -> str:
    if node is None:
        return ""
    amounts = ((node.erased_elements, "elements"), (node.erased_bits, "bits"))
    parts = [f"{value:,.0f} {unit}" for value, unit in amounts if value is not None]
    return f"{node.label}: {' and '.join(parts)}" if parts else str(node.label)
