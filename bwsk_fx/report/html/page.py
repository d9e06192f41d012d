"""A typed graph, rewritten or not, as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.calm import Analysis
from bwsk_fx.errors import PlanError, RuleError
from bwsk_fx.planning.allocate import Totals
from bwsk_fx.report.calm import AxisFact
from bwsk_fx.report.html.charts import frontier_chart, timeline_chart
from bwsk_fx.report.html.document import rendered, write
from bwsk_fx.report.html.nodes import module_tree, node_row
from bwsk_fx.report.html.opened import Opened, regions_of
from bwsk_fx.report.html.rewrite import region_rows, rewritten
from bwsk_fx.report.html.saved import saved_rows
from bwsk_fx.report.html.sizes import Sizes
from bwsk_fx.report.html.step import ForeseenStep, foresee_step
from bwsk_fx.report.nodes import verdict_of
from bwsk_fx.report.saved import RegionPlan
from bwsk_fx.report.summary import counts_of

_NOT_REWRITTEN = "No saved values, memory or rewrite: the graph was not rewritten (see fuse_regions)."
_NOT_PLANNED = "No saved values: no region has a plan yet. Run a training step first, or give inputs."
_NO_INPUTS = "No memory over a step and no frontier: no inputs were given."


def save_html(
    graph: fx.GraphModule,
    path: str | Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    title: str = "model",
) -> tuple[str, ...]:
    """Write a typed graph as one HTML file: operators by module, labels, plans, memory, rewrite and batch axis.

    The file needs no network and no server. What there is no data for is left out, and the page says so. Call it under
    the autocast context that training uses.

    Args:
        graph: A graph that `type_nodes` labelled, or what `fuse_regions` made of one.
        path: The file, which is overwritten; it is written under a temporary name and renamed.
        inputs: Arguments of a training step by name, read for shapes and dtypes only. For a rewritten graph they give
            plans, the memory over a step and the frontier of budgets, on fake tensors: nothing is run. Without them
            plans are those of the latest step.
        title: The model's name.

    Returns:
        What was left out, and why: a sentence each.

    Raises:
        RuleError: The graph, or a node of it, is not typed.
        BwskError: The file cannot be written.
    """
    require_graph(graph)
    data, charts = page_data(graph, inputs, title)
    write(Path(path), rendered(title, data, charts))
    return tuple(data["notes"])


def page_data(
    graph: fx.GraphModule, inputs: Mapping[str, Any] | None, title: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the page shows: its data, which is JSON, and its charts, which are SVG, by name."""
    opened = Opened.of(graph)
    places = {name: place for place, name in enumerate(regions_of(graph))}
    step, plans, notes = _planned(graph, inputs)
    facts, remarks = _facts(graph)
    sizes = Sizes.of(graph, inputs)
    data = {
        "title": title,
        "batch": sizes.batch,
        "summary": _summary(opened),
        "nodes": [node_row(node, places, sizes, facts) for node in opened.nodes],
        "tree": module_tree(opened.nodes),
        "regions": region_rows(graph, opened, plans),
        "saved": saved_rows(plans, opened, places),
        "rewrite": rewritten(graph, opened, places) if places else None,
        "totals": _totals(step, plans),
        "notes": notes + remarks,
    }
    return data, _charts(step)


def _planned(
    graph: fx.GraphModule, inputs: Mapping[str, Any] | None
) -> tuple[ForeseenStep | None, tuple[RegionPlan, ...], list[str]]:
    """Return the step as it would be, the plans, and what is left out."""
    regions = regions_of(graph)
    if not regions:
        return None, (), [_NOT_REWRITTEN]
    notes = [_NO_INPUTS]
    if inputs is not None:
        try:
            step = foresee_step(graph, inputs)
        except PlanError as error:
            notes = [f"No plans for these inputs, no memory over a step and no frontier: {error}."]
        else:
            return step, step.plans, []
    plans = tuple(RegionPlan(name, region.program.plan) for name, region in regions.items() if region.program)
    return None, plans, notes if plans or inputs is not None else [*notes, _NOT_PLANNED]


def _facts(graph: fx.GraphModule) -> tuple[dict[fx.Node, Sequence[AxisFact]], list[str]]:
    """Return what nodes do on axes, and why that is left out where it is not known."""
    try:
        analysis = Analysis.of(graph)
    except RuleError as error:
        return {}, [f"No axes: {error}."]
    return {step.node: analysis.facts(step) for step in analysis.steps}, []


def _summary(opened: Opened) -> dict[str, Any]:
    verdicts = [verdict_of(each.node) for each in opened.nodes]
    rulesets = {verdict.ruleset for verdict in verdicts}
    counts = counts_of(verdict for verdict in verdicts if verdict.counted)
    return {**asdict(counts), "total": counts.total, "ruleset": " and ".join(sorted(rulesets))}


def _totals(step: ForeseenStep | None, plans: Sequence[RegionPlan]) -> dict[str, Any] | None:
    """Return what the step takes; without one, what the regions of the latest step take by themselves."""
    if not plans:
        return None
    totals = step.totals if step else Totals.of([entry.plan for entry in plans])
    outside = totals.kept_bytes - sum(entry.plan.kept_bytes for entry in plans)
    return {**asdict(totals), "overhead": totals.overhead, "outside_bytes": outside}


def _charts(step: ForeseenStep | None) -> dict[str, str]:
    if step is None:
        return {}
    return {
        "timeline": timeline_chart(step.conventional, step.reversible),
        "frontier": frontier_chart(step.frontier, step.totals, step.options),
    }
