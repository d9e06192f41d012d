"""What a rewritten model saves for the backward pass, value by value, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bwsk_fx.arguments import require_model
from bwsk_fx.errors import RegionError
from bwsk_fx.modes import applied
from bwsk_fx.planning.allocate import Totals
from bwsk_fx.planning.options import show_bytes
from bwsk_fx.planning.plan import Plan, PlannedValue
from bwsk_fx.planning.stored import write_plans
from bwsk_fx.report.render import Printable
from bwsk_fx.reversible import ReversibleRegion

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RegionPlan:
    """The plan that one region followed in the latest training step."""

    region: str
    plan: Plan


@dataclass(frozen=True)
class SavedReport(Printable):
    """What the regions of a model keep, and how they come by the rest.

    Attributes:
        regions: The plan of each region, in execution order.
    """

    regions: tuple[RegionPlan, ...]

    @property
    def totals(self) -> Totals:
        """What all regions take in a step, as modelled."""
        return Totals.of([entry.plan for entry in self.regions])

    @property
    def kept_bytes(self) -> int:
        """Bytes that all regions save in a step, parameters excluded."""
        return self.totals.kept_bytes

    def rows(self) -> Iterator[tuple[str, PlannedValue]]:
        """Yield each kept value with the region that keeps it."""
        for entry in self.regions:
            for value in entry.plan.kept:
                yield entry.region, value

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data."""
        return {**asdict(self.totals), **asdict(self)}

    def __rich__(self) -> Table:
        """Return a table; neighbours that follow one plan share their rows."""
        from rich import box
        from rich.table import Table

        title = f"kept for the backward pass: {show_bytes(self.kept_bytes)} ({self.totals})"
        gaps = (0, 1, 0, 0)
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gaps
        )
        for heading in ("node, source", "operator", "value", "size", "needed by"):
            free = heading in ("operator", "needed by")
            table.add_column(
                heading, justify="right" if heading == "size" else "left", overflow="fold", no_wrap=not free
            )
        for name, count, plan in _shared(self.regions):
            times = f" × {count}" if count > 1 else ""
            table.add_row(f"[b]{name}[/b]{times}", "", "", f"[b]{show_bytes(plan.kept_bytes)}[/b]{times}")
            for value in plan.kept:
                table.add_row(*_cells(value, name))
        return table


def explain_saved(model: nn.Module) -> SavedReport:
    """Tell what a rewritten model keeps for the backward pass: one row per value, with its source line and the reason.

    Args:
        model: A graph from `fuse_regions`, or a model that `apply` put into the reversible mode, after at least one
            training step: plans depend on shapes, dtypes and autocast.

    Raises:
        RegionError: The model has no regions, or has not run yet.
    """
    plans = (RegionPlan(region.name, region.program.plan) for region in _regions(model) if region.program)
    return SavedReport(tuple(plans))


def save_plan(model: nn.Module, path: str | Path) -> None:
    """Write the plans of a rewritten model to a JSON file, for `fuse_regions` or `apply` to follow with `plan=path`.

    The file has a plan for every region and every kind of input (shapes, dtypes, autocast) that it has met. It is
    written under a temporary name and renamed.

    Args:
        model: As for `explain_saved`.
        path: The file; one that is there is replaced.

    Raises:
        RegionError: The model has no regions, or has not run yet.
    """
    write_plans(path, [(region.name, plan) for region in _regions(model) for plan in region.plans()])


def _regions(model: nn.Module) -> list[ReversibleRegion]:
    """Return the regions of a model that have run."""
    require_model(model, RegionError)
    state = applied(model)
    graph = state.rewritten if state else model
    regions = [] if graph is None else [module for module in graph.modules() if isinstance(module, ReversibleRegion)]
    if not regions and not (state and state.mode == "reversible"):
        raise RegionError("this model has no reversible regions: rewrite it with fuse_regions or apply first")
    if not any(region.program for region in regions):
        raise RegionError("no region has run yet: plans are made in the first training step; run one, then ask again")
    return regions


def _shared(regions: Sequence[RegionPlan]) -> Iterator[tuple[str, int, Plan]]:
    """Group neighbours that follow the very same plan: the first one's name, their number, the plan."""
    for _, group in groupby(regions, key=lambda entry: id(entry.plan)):
        members = list(group)
        yield members[0].region, len(members), members[0].plan


def _cells(value: PlannedValue, region: str) -> tuple[str, ...]:
    shape = "×".join(map(str, value.shape)) or "scalar"
    node = value.node.removeprefix(f"{region}_")
    # One below the other, so that the table fits 100 columns.
    place = f"  {node}\n    {Path(value.source).name}" if value.source else f"  {node}"
    return place, value.operator, f"{shape} {value.dtype}", show_bytes(value.bytes), value.rule
