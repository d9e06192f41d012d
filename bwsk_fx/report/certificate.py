"""The report of a certification: worst errors by operator and dtype, and what was demoted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bwsk_fx.report.render import Printable
from bwsk_fx.rules.claims import Trial
from bwsk_fx.rules.round_trip import RoundTrip
from bwsk_fx.verdict import Label, Verdict

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class NodeCertificate:
    """What certification found at one S node.

    Attributes:
        node: The node's name.
        operator: What people call its operator.
        trials: What came of its claim in each dtype, the graph's own first.
        verdict: The verdict that is left.
    """

    node: str
    operator: str
    trials: tuple[Trial, ...]
    verdict: Verdict

    @property
    def certified(self) -> bool:
        """Whether the label S stayed."""
        return self.verdict.label is Label.S

    @property
    def condition(self) -> float | None:
        """The condition number of a linear map."""
        return max((trip.condition for trial in self.trials for trip in trial.trips if trip.condition), default=None)

    def error(self, dtype: str) -> float | None:
        """Return the worst relative round-trip error in a dtype (`"float32"`); None where it was not tried."""
        trips = [trip for trial in self.trials if trial.dtype == dtype for trip in trial.trips]
        return max((trip.error for trip in trips), default=None)

    def lost(self, dtype: str) -> int:
        """Return how many elements of the real activations their output does not determine in a dtype."""
        return sum(trial.real.lost for trial in self.trials if trial.dtype == dtype and trial.real is not None)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        return {
            "node": self.node,
            "operator": self.operator,
            "certified": self.certified,
            "condition": self.condition,
            "trials": [_trial_json(trial) for trial in self.trials],
            "verdict": self.verdict.to_json(),
        }


@dataclass(frozen=True)
class Certificates(Printable):
    """What certification found in a graph; prints with `rich`, and as plain text with `str`.

    Attributes:
        nodes: One certificate per node that was S, in the graph's order.
    """

    nodes: tuple[NodeCertificate, ...]

    @property
    def certified(self) -> tuple[NodeCertificate, ...]:
        """The nodes that stay S, now with confidence 1.0."""
        return tuple(node for node in self.nodes if node.certified)

    @property
    def demoted(self) -> tuple[NodeCertificate, ...]:
        """The nodes that became K or GRAY."""
        return tuple(node for node in self.nodes if not node.certified)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that were tried."""
        return tuple(dict.fromkeys(trial.dtype for node in self.nodes for trial in node.trials))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        counts = {"certified": len(self.certified), "demoted": len(self.demoted)}
        return counts | {"nodes": [node.to_json() for node in self.nodes]}

    def __rich__(self) -> Group:
        """Render totals, a row per operator, and the demoted nodes."""
        from rich.console import Group
        from rich.text import Text

        lines = [
            Text(f"{node.verdict.label} {node.node} ({node.operator}): {node.verdict.rationale}")
            for node in self.demoted
        ]
        head = (
            f"[b]{len(self.certified)}[/b] of {len(self.nodes)} S nodes certified, [b]{len(self.demoted)}[/b] demoted"
        )
        return Group(head, *([_table(self)] if self.nodes else []), *lines)


def _table(report: Certificates) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title="worst relative round-trip error",
        title_justify="left",
    )
    for heading in ("operator", "nodes", "demoted", *report.dtypes, "condition"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for operator, nodes in _by_operator(report).items():
        condition = max((node.condition for node in nodes if node.condition), default=None)
        table.add_row(
            operator,
            str(len(nodes)),
            str(sum(not node.certified for node in nodes) or ""),
            *(_cell(nodes, dtype) for dtype in report.dtypes),
            "" if condition is None else f"{condition:.1e}",
        )
    return table


def _by_operator(report: Certificates) -> dict[str, list[NodeCertificate]]:
    rows: dict[str, list[NodeCertificate]] = {}
    for node in report.nodes:
        rows.setdefault(node.operator, []).append(node)
    return rows


def _cell(nodes: list[NodeCertificate], dtype: str) -> str:
    errors = [error for node in nodes if (error := node.error(dtype)) is not None]
    if not errors:
        return "-"
    worst = max(errors)
    return "exact" if worst == 0 else f"{worst:.0e}"


def _trial_json(trial: Trial) -> dict[str, Any]:
    found = {"dtype": trial.dtype, "note": trial.note, "real": trial.real, "adversarial": trial.adversarial}
    return {
        name: _trip_json(value) if isinstance(value, RoundTrip) else value for name, value in found.items() if value
    }


def _trip_json(trip: RoundTrip) -> dict[str, Any]:
    return dict(_fields(trip))


def _fields(trip: RoundTrip) -> Iterator[tuple[str, Any]]:
    for name in ("elements", "lost", "wrong", "error", "condition", "note"):
        value = getattr(trip, name)
        if value not in (None, ""):
            yield name, value
