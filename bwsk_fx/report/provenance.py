"""The ways back from a node: what its value determines, and where it stops to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk_fx.report.render import Printable
from bwsk_fx.verdict import Erasure, Label, Witness, WitnessKind

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


@dataclass(frozen=True)
class PathStep:
    """One S node on a way back.

    Attributes:
        node: Its name.
        operator: What it calls.
        label: Its label.
        witness: What its inverse needs besides its value.
        domain: The condition under which its inverse holds; None where it always does.
        source: `file:line` of the model's code.
    """

    node: str
    operator: str
    label: Label
    witness: Witness
    domain: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Cut:
    """The node that cuts a way back.

    Attributes:
        node: Its name.
        operator: What it calls.
        label: K or GRAY. S where the node itself preserves, and what the way has of it is not enough.
        erasure: What it erases per sample, where its rule knows.
        rationale: One sentence.
        source: `file:line` of the model's code.
    """

    node: str
    operator: str
    label: Label
    erasure: Erasure | None
    rationale: str
    source: str = ""


@dataclass(frozen=True)
class WayBack:
    """One way back from a node: S nodes up to an input, to a cut, or to random values drawn in the model.

    Attributes:
        steps: The S nodes that it goes through, from the node on.
        input: The input that it reaches, else None.
        cut: What cuts it, else None.
    """

    steps: tuple[PathStep, ...]
    input: str | None = None
    cut: Cut | None = None

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        """What has to be at hand to walk it; an operand that several steps need is there once."""
        found: dict[Any, Witness] = {}
        for step in self.steps:
            if step.witness.kind is not WitnessKind.NOTHING:
                shared = step.witness.kind is WitnessKind.OTHER_OPERAND
                found.setdefault(step.witness.names if shared else step.node, step.witness)
        return tuple(found.values())

    @property
    def witness_elements(self) -> int | None:
        """Elements per sample of all witnesses; None where one is not known."""
        return _sum(witness.elements for witness in self.witnesses)

    @property
    def witness_bytes(self) -> int | None:
        """Bytes per sample of all witnesses; None where one is not known."""
        return _sum(witness.bytes for witness in self.witnesses)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries, with the sums of the witnesses."""
        sums = {"witness_elements": self.witness_elements, "witness_bytes": self.witness_bytes}
        return asdict(self) | sums


@dataclass(frozen=True)
class Provenance(Printable):
    """What the value of a node says about where it came from; prints with `rich`, and as plain text with `str`.

    Attributes:
        node: Its name.
        operator: What it calls.
        label: Its label.
        ways: One way back to each input that it determines, and one to each cut. None at all: the node is static.
    """

    node: str
    operator: str
    label: Label
    ways: tuple[WayBack, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that the value determines, given the witnesses of the way to each."""
        return tuple(way.input for way in self.ways if way.input is not None)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The first node on each other way that erases, or that no rule covers."""
        return tuple(way.cut for way in self.ways if way.cut is not None)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        return {
            "node": self.node,
            "operator": self.operator,
            "label": self.label,
            "inputs": list(self.inputs),
            "cuts": [asdict(cut) for cut in self.cuts],
            "ways": [way.to_json() for way in self.ways],
        }

    def __rich__(self) -> Group:
        """Render a headline, and each way as a table."""
        from rich.console import Group

        return Group(f"[b]{self.node}[/b] ({self.operator}, {self.label}) {_in_words(self)}", *self._ways())

    def _ways(self) -> Iterator[RenderableType]:
        for number, way in enumerate(self.ways, 1):
            count = f" {number} of {len(self.ways)}" if len(self.ways) > 1 else ""
            yield f"\n[b]way back{count}[/b]{_end(way)}"
            yield _table(way)
            yield from _remarks(way)


def _sum(amounts: Iterable[int | None]) -> int | None:
    known = list(amounts)
    return None if None in known else sum(amount for amount in known if amount is not None)


def _in_words(found: Provenance) -> str:
    if not found.ways:
        return "is static: it depends on no input"
    if not found.inputs:
        return "determines no input of the model"
    helped = any(way.witnesses for way in found.ways if way.input is not None)
    return f"determines {', '.join(found.inputs)}{', given the witnesses below' if helped else ''}"


def _end(way: WayBack) -> str:
    if way.cut is not None:
        return f": cut at [b]{way.cut.node}[/b]"
    return f": reaches [b]{way.input}[/b]" if way.input is not None else ": ends in random values"


def _table(way: WayBack) -> RenderableType:
    from rich import box
    from rich.table import Table

    # Narrow gaps, since names of nodes are long.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("node", "operator", "label", "needs, or erases"):
        table.add_column(heading, overflow="fold")
    for step in way.steps:
        table.add_row(step.node, step.operator, step.label, _needs(step.witness))
    if way.cut is not None:
        table.add_row(way.cut.node, way.cut.operator, way.cut.label, _erases(way.cut), style="bold")
    elif way.input is not None:
        table.add_row(way.input, "input", "", "", style="bold")
    return table


def _remarks(way: WayBack) -> Iterator[RenderableType]:
    from rich.text import Text

    for step in way.steps:
        if step.domain is not None:
            yield Text(f"{step.node} is undone where {step.domain}")
    if way.witnesses:
        yield Text(f"at hand for this way: {_amount(way.witness_elements, way.witness_bytes)}")
    if way.cut is not None:
        place = f" ({Path(way.cut.source).name})" if way.cut.source else ""
        yield Text(f"{way.cut.rationale}{place}")


def _needs(witness: Witness) -> str:
    if witness.kind is WitnessKind.NOTHING:
        return ""
    if witness.kind is WitnessKind.UNSTATED:
        return "unstated"
    size = "" if witness.elements is None else f": {witness.elements:,}"
    return f"{', '.join(witness.names)}{size}"


def _erases(cut: Cut) -> str:
    if cut.erasure is None:
        return "an unknown amount" if cut.label is Label.K else ""
    amounts = ((cut.erasure.elements, "elements"), (cut.erasure.bits, "bits"))
    return " and ".join(f"{amount:,.0f} {unit}" for amount, unit in amounts if amount is not None)


def _amount(elements: int | None, size: int | None) -> str:
    if elements is None:
        return "witnesses of unknown size"
    return f"{elements:,} elements{'' if size is None else f', {size:,} bytes'} per sample"
