"""Some nodes of a typed graph, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from bwsk_fx.errors import InspectError
from bwsk_fx.report.records import NodeRecord
from bwsk_fx.report.render import Printable
from bwsk_fx.report.tables import amount, place, plain_table
from bwsk_fx.verdict import Label

if TYPE_CHECKING:
    from rich.table import Table

_FIELDS: dict[str, Callable[[NodeRecord], str]] = {
    "verdict": lambda node: str(node.label),
    "operator": lambda node: node.operator,
    "module": lambda node: node.module,
}


@dataclass(frozen=True)
class Listing(Printable):
    """Nodes of a graph; prints with `rich`, and as plain text with `str`."""

    nodes: tuple[NodeRecord, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return JSON-ready dictionaries."""
        return [node.to_json() for node in self.nodes]

    def __rich__(self) -> Table:
        """Render a row per node."""
        title = f"{len(self.nodes)} node{'' if len(self.nodes) == 1 else 's'}"
        table = plain_table(title, ("verdict", "node", "elements", "bits"), ("verdict", "node"))
        for node in self.nodes:
            amounts = (amount(node.erased_elements), amount(node.erased_bits))
            table.add_row(str(node.label), place(node.name, node.operator, node.source), *amounts)
        return table


Filters = Mapping[str, Sequence[str]]


def read_filters(words: Sequence[str]) -> Filters:
    """Return the patterns of each kind of filter.

    Args:
        words: `verdict=K`, `operator=Linear` or `module=encoder.*`, with `*` for any text.

    Raises:
        InspectError: A filter is not read.
    """
    wanted: dict[str, list[str]] = {}
    for each in words:
        kind, pattern = _parsed(each)
        wanted.setdefault(kind, []).append(pattern)
    return wanted


def filtered(nodes: Iterable[NodeRecord], filters: Filters) -> tuple[NodeRecord, ...]:
    """Return the counted nodes that pass every kind of filter; of one kind one pattern is enough.

    Args:
        nodes: The nodes of a graph.
        filters: What `read_filters` returned.
    """
    return tuple(
        node
        for node in nodes
        if node.counted
        and all(
            any(fnmatchcase(_FIELDS[kind](node), pattern) for pattern in patterns) for kind, patterns in filters.items()
        )
    )


def _parsed(words: str) -> tuple[str, str]:
    kind, equals, pattern = words.partition("=")
    if not equals or kind not in _FIELDS:
        raise InspectError(f"--filter '{words}' is not read: it is {', '.join(f'{name}=…' for name in _FIELDS)}")
    if kind == "verdict":
        pattern = pattern.upper()
        if pattern not in set(Label):
            raise InspectError(f"--filter '{words}': there is no such verdict; there are {', '.join(Label)}")
    return kind, pattern
