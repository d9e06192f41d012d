"""What a rewritten model saves for the backward pass, value by value, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import nn

from bwsk_fx.errors import RegionError
from bwsk_fx.modes import applied
from bwsk_fx.planning.plan import Plan, PlannedValue
from bwsk_fx.report.render import as_text
from bwsk_fx.reversible import ReversibleRegion

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RegionPlan:
    """The plan that one region followed in the latest training step."""

    region: str
    plan: Plan


@dataclass(frozen=True)
class SavedReport:
    """What the regions of a model keep, and how they come by the rest.

    Attributes:
        regions: The plan of each region, in execution order.
    """

    regions: tuple[RegionPlan, ...]

    @property
    def kept_bytes(self) -> int:
        """Bytes that all regions save in a step, parameters excluded."""
        return sum(entry.plan.kept_bytes for entry in self.regions)

    def rows(self) -> Iterator[tuple[str, PlannedValue]]:
        """Yield each kept value with the region that keeps it."""
        for entry in self.regions:
            for value in entry.plan.kept:
                yield entry.region, value

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data."""
        return {"kept_bytes": self.kept_bytes, **asdict(self)}

    def __rich__(self) -> Table:
        """Return a table; regions that follow one plan share their rows."""
        from rich.table import Table

        table = Table(title=f"kept for the backward pass: {_size(self.kept_bytes)}", title_justify="left")
        for heading in ("region", "node", "operator", "shape", "dtype", "size", "source", "why"):
            table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
        for names, plan in _shared(self.regions):
            for index, value in enumerate(plan.kept):
                table.add_row(names if index == 0 else "", *_cells(value), end_section=index == len(plan.kept) - 1)
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self)


def explain_saved(model: nn.Module) -> SavedReport:
    """Tell what a rewritten model keeps for the backward pass: one row per value, with its source line and the reason.

    Args:
        model: A graph from `fuse_regions`, or a model that `apply` put into the reversible mode, after at least one
            training step: plans depend on shapes, dtypes and autocast.

    Raises:
        RegionError: The model has no regions, or has not run yet.
    """
    state = applied(model)
    graph = state.rewritten if state else model
    regions = [] if graph is None else [module for module in graph.modules() if isinstance(module, ReversibleRegion)]
    if not regions and not (state and state.mode == "reversible"):
        raise RegionError("this model has no reversible regions: rewrite it with fuse_regions or apply first")
    plans = tuple(RegionPlan(region.name, region.program.plan) for region in regions if region.program)
    if not plans:
        raise RegionError("no region has run yet: plans are made in the first training step; run one, then ask again")
    return SavedReport(plans)


def _shared(regions: Sequence[RegionPlan]) -> Iterator[tuple[str, Plan]]:
    """Group neighbours that follow the very same plan."""
    for _, group in groupby(regions, key=lambda entry: id(entry.plan)):
        members = list(group)
        first, last = members[0], members[-1]
        yield first.region if first is last else f"{first.region} … {last.region} ({len(members)}×)", first.plan


def _cells(value: PlannedValue) -> tuple[str, ...]:
    shape = "×".join(map(str, value.shape)) or "scalar"
    source = "/".join(value.source.rsplit("/", 1)[-1:])
    return value.node, value.operator, shape, value.dtype, _size(value.bytes), source, value.rule


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count / 2**10:.2f} KiB"
