"""The reports that `bwsk-fx inspect` shows, and their JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import fx

import bwsk_fx
from bwsk_fx.inspection.sources import Request, Source, load
from bwsk_fx.report.difference import compare_graphs
from bwsk_fx.report.listing import Listing, filtered, read_filters
from bwsk_fx.report.operators import by_operator, hot_spots
from bwsk_fx.report.records import records

# Of the JSON, as inspect.schema.json describes it; a change that breaks readers counts it up.
SCHEMA = 1


@dataclass(frozen=True)
class Wanted:
    """What a user wants to see.

    Attributes:
        model: The name of the model.
        ruleset: Which rules label its operators.
        extra: Reports beyond the usual ones: `calm`, `compare`, `certify`, `erasure`.
        node: A node to follow back.
        filters: Which nodes to list; see `read_filters`.
        other: A model to compare with.
        top: Number of hot spots.
    """

    model: str
    ruleset: str = "sound"
    extra: frozenset[str] = frozenset()
    node: str | None = None
    filters: tuple[str, ...] = ()
    other: str | None = None
    top: int = 10


def reports(wanted: Wanted, request: Request) -> tuple[Source, dict[str, Any]]:
    """Return the model, whose graph is typed then, and each report under its key in the JSON.

    Raises:
        BwskError: See `sources.load`; or a filter is not read, or there is no such node.
    """
    filters = read_filters(wanted.filters)
    source = load(wanted.model, request)
    graph = bwsk_fx.type_nodes(source.graph, ruleset=wanted.ruleset)
    # Certification corrects verdicts, which the other reports then show.
    certificates = {"certificates": _certificates(wanted, source)} if "certify" in wanted.extra else {}
    nodes = records(graph)
    chosen = filtered(nodes, filters)
    found = {"summary": bwsk_fx.summarize(graph), "operators": by_operator(chosen)}
    found |= {"hot_spots": hot_spots(chosen, wanted.top)} if wanted.ruleset == "sound" else {}
    found |= {"nodes": Listing(chosen)} if wanted.filters else {}
    return source, found | certificates | _extras(wanted, graph) | _difference(wanted, request, graph)


def as_json(wanted: Wanted, found: dict[str, Any]) -> str:
    """Return reports as the JSON that inspect.schema.json describes."""
    head = {"schema": SCHEMA, "model": wanted.model, "ruleset": wanted.ruleset}
    return json.dumps(head | {name: report.to_json() for name, report in found.items()}, indent=1)


def _certificates(wanted: Wanted, source: Source) -> Any:
    return bwsk_fx.certify(source.graph, source.inputs_for("--certify", wanted.model))


def _extras(wanted: Wanted, graph: fx.GraphModule) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "compare" in wanted.extra:
        found["comparison"] = bwsk_fx.compare_rulesets(graph)
    if "calm" in wanted.extra:
        found["calm"] = bwsk_fx.analyze_calm(graph)
    if "erasure" in wanted.extra:
        found["erasure"] = bwsk_fx.erasure_budget(graph)
    if wanted.node is not None:
        found["provenance"] = bwsk_fx.trace_back(graph, wanted.node)
    return found


def _difference(wanted: Wanted, request: Request, graph: fx.GraphModule) -> dict[str, Any]:
    if wanted.other is None:
        return {}
    # What the options say is about the model that is inspected; the other is taken as it is.
    other = bwsk_fx.type_nodes(load(wanted.other, Request(request.batch_size)).graph, ruleset=wanted.ruleset)
    return {"difference": compare_graphs(graph, other, (wanted.model, wanted.other))}
