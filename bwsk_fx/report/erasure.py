"""The erasure budget: what is erased per layer, and in all up to there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bwsk_fx.report.render import Printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class NodeErasure:
    """One K node.

    Attributes:
        node: Its name.
        operator: What it calls.
        module: Path of the leaf module; empty for functions and methods.
        erased_elements: Elements per sample that it erases, where its rule knows.
        erased_bits: Bits per sample that it erases of elements that survive otherwise, where its rule knows.
        operand_elements: Elements per sample of all its dynamic operands; None where not proportional to the batch.
    """

    node: str
    operator: str
    module: str = ""
    erased_elements: float | None = None
    erased_bits: float | None = None
    operand_elements: int | None = None

    @property
    def measured(self) -> bool:
        """Whether its rule knows how much it erases."""
        return self.erased_elements is not None or self.erased_bits is not None

    @property
    def share(self) -> float | None:
        """The part of its operands' elements that it erases; None where it erases bits or no part of known size."""
        if self.erased_elements is None or not self.operand_elements:
            return None
        share = self.erased_elements / self.operand_elements
        return share if share <= 1 else None


@dataclass(frozen=True)
class LayerErasure:
    """A run of nodes of one layer: a repeated block, or a module outside of blocks.

    Attributes:
        layer: Path of the block or module; empty for what the model's own forward method calls.
        nodes: Its K nodes.
        gray: Number of its GRAY nodes.
        cumulative_elements: Elements per sample that are erased up to the end of the layer.
        cumulative_bits: Bits per sample that are erased up to the end of the layer.
    """

    layer: str
    nodes: tuple[NodeErasure, ...]
    gray: int
    cumulative_elements: float
    cumulative_bits: float

    @property
    def k(self) -> int:
        """Number of K nodes."""
        return len(self.nodes)

    @property
    def erased_elements(self) -> float:
        """Elements per sample that the K nodes erase, where their rules know."""
        return sum(node.erased_elements or 0 for node in self.nodes)

    @property
    def erased_bits(self) -> float:
        """Bits per sample that the K nodes erase of elements that survive otherwise, where their rules know."""
        return sum(node.erased_bits or 0 for node in self.nodes)

    @property
    def unmeasured(self) -> int:
        """Number of K nodes whose rule does not know how much they erase."""
        return sum(not node.measured for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        nodes = [asdict(node) | {"share": node.share} for node in self.nodes]
        sums = ("k", "unmeasured", "erased_elements", "erased_bits")
        return asdict(self) | {"nodes": nodes} | {name: getattr(self, name) for name in sums}


@dataclass(frozen=True)
class ErasureBudget(Printable):
    """What a model erases per sample, layer by layer; prints with `rich`, and as plain text with `str`.

    Attributes:
        layers: One entry per run of nodes of one layer, in execution order: a layer that runs twice, with others in
            between, is there twice.
    """

    layers: tuple[LayerErasure, ...]

    @property
    def erased_elements(self) -> float:
        """Elements per sample that the whole model erases, as `Summary` counts them."""
        return self.layers[-1].cumulative_elements if self.layers else 0

    @property
    def erased_bits(self) -> float:
        """Bits per sample that the whole model erases of elements that survive otherwise."""
        return self.layers[-1].cumulative_bits if self.layers else 0

    @property
    def unmeasured(self) -> int:
        """Number of K nodes whose rule does not know how much they erase."""
        return sum(layer.unmeasured for layer in self.layers)

    @property
    def gray(self) -> int:
        """Number of GRAY nodes."""
        return sum(layer.gray for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries, with the totals."""
        return {
            "erased_elements": self.erased_elements,
            "erased_bits": self.erased_bits,
            "unmeasured": self.unmeasured,
            "gray": self.gray,
            "layers": [layer.to_json() for layer in self.layers],
        }

    def __rich__(self) -> Group:
        """Render a row per layer, then a row per K node, where runs of equal layers share theirs."""
        from rich.console import Group

        return Group(_layer_table(self), "", _node_table(self.layers))


def _layer_table(budget: ErasureBudget) -> Table:
    table = _titled("erased per sample, layer by layer")
    columns = ["elements", "bits", "elements\nso far", "bits\nso far"]
    extra = {"GRAY": budget.gray, "unmeasured\nK": budget.unmeasured}
    for heading in ("layer", "K", *(name for name, count in extra.items() if count), *columns):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for layer in budget.layers:
        counts = [layer.k, *([layer.gray] if budget.gray else []), *([layer.unmeasured] if budget.unmeasured else [])]
        sums = (layer.erased_elements, layer.erased_bits, layer.cumulative_elements, layer.cumulative_bits)
        table.add_row(_name(layer.layer), *(f"{amount:,.0f}" for amount in (*counts, *sums)))
    return table


def _node_table(layers: Sequence[LayerErasure]) -> Table:
    table = _titled("what erases it")
    for heading in ("layer", "node", "elements", "of operands", "bits"):
        table.add_column(heading, justify="left" if heading in ("layer", "node") else "right", overflow="fold")
    for name, layer in _shared(layers):
        for node in layer.nodes:
            share = "" if node.share is None else f"{node.share:.1%}"
            cells = (_amount(node.erased_elements), share, _amount(node.erased_bits))
            table.add_row(name, _place(node, layer.layer), *(cells if node.measured else ("unknown", "", "")))
            name = ""
    return table


def _titled(title: str) -> Table:
    from rich import box
    from rich.table import Table

    # Narrow gaps, so that ViT-base fits 80 columns.
    gaps = (0, 1, 0, 0)
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gaps)


def _shared(layers: Sequence[LayerErasure]) -> Iterator[tuple[str, LayerErasure]]:
    """Yield one layer of each run of numbered neighbours whose K nodes are alike, with the name of the run."""
    erasing = [layer for layer in layers if layer.nodes]
    for _, run in groupby(enumerate(erasing), lambda place: _kind(*place)):
        members = [layer for _, layer in run]
        first, last = _name(members[0].layer), members[-1].layer.rpartition(".")[2]
        yield (first if len(members) == 1 else f"{first}-{last}"), members[0]


def _kind(place: int, layer: LayerErasure) -> tuple[Any, ...]:
    """What the members of a run have in common; indices that count up with the place do so by one."""
    section, _, index = layer.layer.rpartition(".")
    run = (section, int(index) - place) if index.isdecimal() else (layer.layer, place)
    nodes = (
        (node.operator, _place(node, layer.layer), node.erased_elements, node.erased_bits, node.operand_elements)
        for node in layer.nodes
    )
    return (*run, *nodes)


def _place(node: NodeErasure, layer: str) -> str:
    """Name a node inside its layer: a module's path from there on, and what else it calls."""
    inside = node.module.removeprefix(layer).removeprefix(".")
    return inside or node.operator


def _name(layer: str) -> str:
    return layer or "(top level)"


def _amount(amount: float | None) -> str:
    return "" if amount is None else f"{amount:,.0f}"
