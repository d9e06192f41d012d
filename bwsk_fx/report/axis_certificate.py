"""The report of an axis certification: which claims of the CALM analysis hold on real tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bwsk_fx.report.render import Printable
from bwsk_fx.rules.axis import Behaviour

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


class Status(StrEnum):
    """What the trial of a claim showed."""

    CERTIFIED = "certified"
    WRONG = "wrong"
    CAUTIOUS = "cautious"
    UNTRIED = "untried"


@dataclass(frozen=True)
class AxisCertificate:
    """What came of one claim.

    Attributes:
        node: The node's name.
        target: What it calls.
        axis: The axis; empty where no operator named it.
        behaviour: What is claimed.
        role: Which part the axis plays.
        status: Whether the claim holds; `cautious` is a BARRIER where shards turned out not to need each other.
        why: What was seen.
        parameters: Parameters that are sharded along the axis with their dimension.
        error: The largest difference to the unsharded run, relative to the largest element.
    """

    node: str
    target: str
    axis: str
    behaviour: Behaviour
    role: str
    status: Status
    why: str
    parameters: tuple[tuple[str, int], ...] = ()
    error: float = 0.0


@dataclass(frozen=True)
class AxisCertificates(Printable):
    """What came of all claims of a graph; prints with `rich`, and as plain text with `str`.

    Attributes:
        claims: One certificate per claim, in the graph's order.
        unknown: Nodes that have no axis rule, about which nothing is claimed.
        nodes: How many nodes claim anything.
    """

    claims: tuple[AxisCertificate, ...]
    unknown: tuple[str, ...]
    nodes: int

    def having(self, status: Status) -> tuple[AxisCertificate, ...]:
        """Return the certificates of one status."""
        return tuple(claim for claim in self.claims if claim.status is status)

    @property
    def wrong(self) -> tuple[AxisCertificate, ...]:
        """The claims that a run on shards refutes."""
        return self.having(Status.WRONG)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        counts = Counter(claim.status for claim in self.claims)
        return {
            "counts": {str(status): counts[status] for status in Status},
            "unknown": list(self.unknown),
            "nodes": self.nodes,
            "claims": [asdict(claim) for claim in self.claims],
        }

    def __rich__(self) -> Group:
        """Render counts by axis and behaviour, and every claim that is not certified."""
        from rich.console import Group
        from rich.text import Text

        told = (Status.WRONG, Status.CAUTIOUS, Status.UNTRIED)
        lines = [
            Text(f"{claim.status}: {claim.behaviour} on {claim.axis or 'an axis'} at {claim.node}: {claim.why}")
            for status in told
            for claim in self.having(status)
        ]
        if self.unknown:
            lines.append(Text(f"no axis rule: {', '.join(self.unknown)}"))
        return Group(_table(self), *lines)


def _table(report: AxisCertificates) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="axis claims", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("axis", "behaviour", *Status):
        table.add_column(heading, justify="left" if heading in ("axis", "behaviour") else "right")
    counts = Counter((claim.axis, claim.behaviour, claim.status) for claim in report.claims)
    for axis, behaviour in dict.fromkeys((claim.axis, claim.behaviour) for claim in report.claims):
        numbers = (str(counts[axis, behaviour, status] or "") for status in Status)
        table.add_row(axis or "(no name)", str(behaviour), *numbers)
    return table
