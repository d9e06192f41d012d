"""The summary of a typed graph: counts, ratios, erasure, and a row per block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.blocks import block_of, grouped, section_and_index, span
from bwsk_fx.report.nodes import verdict_of
from bwsk_fx.report.render import Printable
from bwsk_fx.verdict import Label, Verdict

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_COUNTED = {"sound": "operators on dynamic tensors", "published": "leaf-module calls"}


@dataclass(frozen=True)
class Counts:
    """How many nodes carry each label, and what the K nodes erase per sample.

    Attributes:
        s: Number of S nodes.
        k: Number of K nodes.
        gray: Number of GRAY nodes.
        erased_elements: Elements per sample that K nodes erase, where their rules know.
        erased_bits: Bits per sample that K nodes erase of elements that survive otherwise.
        unmeasured: Number of K nodes whose rule does not know how much they erase.
    """

    s: int = 0
    k: int = 0
    gray: int = 0
    erased_elements: float = 0
    erased_bits: float = 0
    unmeasured: int = 0

    @property
    def total(self) -> int:
        """Number of counted nodes."""
        return self.s + self.k + self.gray

    @property
    def s_ratio(self) -> float:
        """Share of S nodes; 0 in a graph without counted nodes."""
        return self.s / self.total if self.total else 0.0

    @property
    def k_ratio(self) -> float:
        """Share of K nodes."""
        return self.k / self.total if self.total else 0.0


@dataclass(frozen=True)
class Block(Counts):
    """The counts of one repeated block, such as `vit.layers.3`.

    Attributes:
        section: Path of the container.
        index: The block's number there.
    """

    section: str = ""
    index: int = 0


@dataclass(frozen=True)
class GrayNode:
    """A node that no rule labels S or K."""

    name: str
    operator: str
    rationale: str


@dataclass(frozen=True)
class Summary(Counts, Printable):
    """What the verdicts of a graph add up to; prints with `rich`, and as plain text with `str`.

    Attributes:
        ruleset: `"sound"` counts every operator with a dynamic tensor result, `"published"` leaf-module calls.
        blocks: One row per repeated block, in order.
        gray_nodes: The counted GRAY nodes.
    """

    ruleset: str = "sound"
    blocks: tuple[Block, ...] = ()
    gray_nodes: tuple[GrayNode, ...] = ()

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return _COUNTED.get(self.ruleset, "nodes")

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries, with total and ratios."""
        totals = {"total": self.total, "s_ratio": self.s_ratio, "k_ratio": self.k_ratio}
        return asdict(self) | totals

    def __rich__(self) -> Group:
        """Render totals, erasure, blocks and GRAY nodes."""
        from rich.console import Group
        from rich.text import Text

        table = [_block_table(self.blocks)] if self.blocks else []
        gray = [Text(f"GRAY {node.name} ({node.operator}): {node.rationale}") for node in self.gray_nodes]
        return Group(*_headlines(self), *table, *gray)


def summarize(graph: fx.GraphModule) -> Summary:
    """Add up the verdicts of a typed graph.

    Under `published` leaf-module calls are counted: a module that is called twice counts twice. Under `sound` every
    operator with a dynamic tensor result is counted: not inputs, attributes, sizes, static values and outputs.

    Raises:
        RuleError: The graph, or a node of it, is not typed.
    """
    require_graph(graph)
    nodes = [(node, verdict_of(node)) for node in graph.graph.nodes]
    counted = [(node, verdict) for node, verdict in nodes if verdict.counted]
    return Summary(
        **asdict(counts_of(verdict for _, verdict in counted)),
        ruleset=nodes[0][1].ruleset if nodes else "sound",
        blocks=tuple(_blocks(counted)),
        gray_nodes=tuple(
            GrayNode(node.name, _operator(node), verdict.rationale)
            for node, verdict in counted
            if verdict.label is Label.GRAY
        ),
    )


def counts_of(verdicts: Iterable[Verdict]) -> Counts:
    """Count labels, and add up what K nodes erase."""
    verdicts = list(verdicts)
    found = [verdict.label for verdict in verdicts]
    erasures = [verdict.erasure for verdict in verdicts if verdict.erasure is not None]
    return Counts(
        found.count(Label.S),
        found.count(Label.K),
        found.count(Label.GRAY),
        sum(erasure.elements or 0 for erasure in erasures),
        sum(erasure.bits or 0 for erasure in erasures),
        found.count(Label.K) - len(erasures),
    )


def _blocks(counted: list[tuple[fx.Node, Verdict]]) -> Iterator[Block]:
    for path, inside in grouped(counted, lambda each: block_of(each[0])):
        section, index = section_and_index(path)
        yield Block(**asdict(counts_of(verdict for _, verdict in inside)), section=section, index=index)


def _operator(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _headlines(summary: Summary) -> Iterator[str]:
    counts = f"[b]{summary.s} S[/b], [b]{summary.k} K[/b], [b]{summary.gray} GRAY[/b]"
    yield f"{counts} of {summary.total} {summary.unit}; S ratio {summary.s_ratio:.1%}"
    if summary.ruleset == "sound":
        nodes = f"{summary.unmeasured} K node{'s' if summary.unmeasured > 1 else ''}"
        unknown = f", and an unknown amount by {nodes}" if summary.unmeasured else ""
        yield f"erased per sample: {summary.erased_elements:,.0f} elements and {summary.erased_bits:,.0f} bits{unknown}"


def _block_table(blocks: tuple[Block, ...]) -> Table:
    """A row per run of equal neighbours."""
    from rich import box
    from rich.table import Table

    measured = any(block.erased_elements or block.erased_bits for block in blocks)
    headings = ["block", "S", "K", "GRAY", *(["erased elements", "erased bits"] if measured else [])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for (section, *counts), run in groupby(blocks, _row):
        indices = [block.index for block in run]
        cells = [f"{count:,.0f}" for count in counts]
        table.add_row(span(section, indices), *cells[: len(headings) - 1])
    return table


def _row(block: Block) -> tuple[Any, ...]:
    return (block.section, *(getattr(block, field.name) for field in fields(Counts) if field.name != "unmeasured"))
