"""The Pareto frontier of a graph: how little a step can hold for how much time, without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from bwsk_fx.arguments import require_graph, require_named
from bwsk_fx.passes.fuse_regions import fuse_regions
from bwsk_fx.planner import Foresight, choose, foresee
from bwsk_fx.planning.allocate import Totals
from bwsk_fx.planning.options import PlanKeywords, PlanOptions, plan_options, show_bytes
from bwsk_fx.report.render import Printable

if TYPE_CHECKING:
    from typing import Unpack

    from rich.table import Table

BUDGETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, math.inf)


@dataclass(frozen=True)
class FrontierPoint:
    """What a budget buys.

    Attributes:
        budget: Extra time, as a fraction of the conventional step.
        totals: What the step takes, as modelled.
    """

    budget: float
    totals: Totals


@dataclass(frozen=True)
class Frontier(Printable):
    """Plans of which none holds less than another in less time.

    Attributes:
        points: From the least time to the least memory.
    """

    points: tuple[FrontierPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the points as JSON-compatible data; the budget without bound is null."""
        budgets = (None if math.isinf(point.budget) else point.budget for point in self.points)
        rows = [
            {"budget": budget, "overhead": point.totals.overhead, **asdict(point.totals)}
            for budget, point in zip(budgets, self.points, strict=True)
        ]
        return {"points": rows}

    def __rich__(self) -> Table:
        """Return a table of the points."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("budget", "modelled time", "kept", "of eager's", "peak"):
            table.add_column(heading, justify="right")
        for point in self.points:
            totals = point.totals
            share = totals.kept_bytes / (totals.conventional_bytes or 1)
            sizes = show_bytes(totals.kept_bytes), f"{share:.0%}", show_bytes(totals.peak_bytes)
            table.add_row(f"{point.budget:g}", f"{totals.overhead:+.1%}", *sizes)
        return table


def plan_frontier(
    graph: fx.GraphModule,
    inputs: Mapping[str, Any],
    budgets: Sequence[float] = BUDGETS,
    *,
    granularity: str = "block",
    **options: Unpack[PlanKeywords],
) -> Frontier:
    """Plan a training step for several budgets at once, on fake tensors: nothing is run, no memory is used.

    Call it under the autocast context that training uses.

    Args:
        graph: A captured graph; it stays as it is.
        inputs: Arguments of the step by name, read for shapes and dtypes only.
        budgets: Extra time, as fractions of the conventional step.
        granularity: What becomes one region, see `fuse_regions`.
        options: Further options of the plan, see `PlanOptions`.

    Returns:
        One point per budget, without those that another point beats in time and in peak memory.

    Raises:
        PlanError: An option is out of range, or the step cannot be run on fake tensors.
        RegionError: The graph has no region.
    """
    require_named(inputs)
    require_graph(graph)
    plans = [plan_options(budget, **options) for budget in budgets]
    return _frontier(foresee(fuse_regions(graph, granularity=granularity, **options), (), inputs), plans)


def frontier_of(foresight: Foresight, options: PlanOptions, budgets: Sequence[float] = BUDGETS) -> Frontier:
    """Return what budgets buy in a step that has been foreseen, under the other options of its plan.

    Args:
        foresight: The step.
        options: What its plan was asked for; bounds on memory and files of plans do not count.
        budgets: Extra time, as fractions of the conventional step.
    """
    free = replace(options, memory=None, activation_fraction=None, plan=None)
    return _frontier(foresight, [replace(free, budget=budget) for budget in budgets])


def _frontier(foresight: Foresight, plans: Sequence[PlanOptions]) -> Frontier:
    candidates = foresight.candidates()
    points = []
    for plan in plans:
        chosen = choose(candidates, plan, foresight.outside_bytes)
        programs = [own[index].plan for own, index in zip(candidates, chosen, strict=True)]
        points.append(FrontierPoint(plan.budget, Totals.of(programs, foresight.outside_bytes)))
    return Frontier(tuple(point for point in points if not any(_beats(other, point) for other in points)))


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    """Whether a point is as good as another in all respects, and better in one."""
    figures = [(two.totals.planned_seconds, two.totals.peak_bytes, two.totals.kept_bytes) for two in (one, other)]
    return figures[0] != figures[1] and all(mine <= theirs for mine, theirs in zip(*figures, strict=True))
