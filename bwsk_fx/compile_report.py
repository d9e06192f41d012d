"""What became of the graphs that `torch.compile` handed to the backend, to be read afterwards."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.calm import analyze_calm
from bwsk_fx.dynamo_graphs import as_captured
from bwsk_fx.errors import BwskError, PlanError
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.planning.kernels import fake_mode_of
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.plan import Plan
from bwsk_fx.report.calm import CalmReport

# Reports of the latest graphs are kept; a graph's constants are with them.
_KEPT_REPORTS = 32


@dataclass(frozen=True)
class CompileReport:
    """What became of one graph of Dynamo's.

    Attributes:
        graph: Dynamo's graph, with the user's lines; by `Partitioner`, the joint graph.
        options: What its plan was asked for.
        plan: What is kept, recomputed and inverted; None where nothing is trained.
        forward: The forward half as planned, in ATen calls; None where nothing is trained.
        backward: The backward half, likewise.
    """

    graph: fx.GraphModule
    options: PlanOptions
    plan: Plan | None
    forward: fx.GraphModule | None
    backward: fx.GraphModule | None

    @cached_property
    def typed(self) -> fx.GraphModule:
        """The graph with a verdict on every node, in the form in which `capture` returns graphs.

        Every report on typed graphs takes it. Amounts are those of the batch that it was compiled for, unless Dynamo
        made the batch size symbolic.

        Raises:
            RuleError: A rule failed.
            PassError: The graph calls a function of its own, as autograd Functions become.
        """
        captured = as_captured(self.graph)
        # The graph may be on its way through the compiler.
        with private.undisturbed(fake_mode_of([node.meta.get("val") for node in captured.graph.nodes])):
            return type_nodes(captured)

    @cached_property
    def calm(self) -> CalmReport:
        """Which parts of the graph run without coordination, along each axis."""
        return analyze_calm(self.typed)


_REPORTS: deque[CompileReport] = deque(maxlen=_KEPT_REPORTS)


def last_report() -> CompileReport:
    """Return what became of the graph that was compiled last.

    Raises:
        PlanError: Nothing has been compiled with the backend or the partitioner yet.
    """
    if not _REPORTS:
        raise PlanError(
            'nothing has been compiled with backend="bwsk_fx" yet: call the compiled model once. What Inductor takes '
            "from its cache is not planned anew, and has no report"
        )
    return _REPORTS[-1]


def reports() -> tuple[CompileReport, ...]:
    """Return the reports of the latest graphs, in the order in which they were compiled; one per graph break."""
    return tuple(_REPORTS)


def add_report(report: CompileReport) -> None:
    """Keep a report, and add it to the structured trace that `tlparse` shows, where one is written."""
    _REPORTS.append(report)
    private.trace_artifact("bwsk_fx_types", "string", lambda: _labels(report))
    if report.plan is not None and report.forward is not None and report.backward is not None:
        plan, forward, backward = report.plan, report.forward, report.backward
        private.trace_artifact("bwsk_fx_plan", "json", lambda: json.dumps(plan.to_json()))
        private.trace_artifact("bwsk_fx_forward", "string", lambda: _readable(forward))
        private.trace_artifact("bwsk_fx_backward", "string", lambda: _readable(backward))


def _readable(module: fx.GraphModule) -> str:
    return module.print_readable(print_output=False)


def _labels(report: CompileReport) -> str:
    """One line per operator on dynamic tensors: label, node, module, reason."""
    try:
        typed = report.typed
    except BwskError as error:
        # A trace must not keep a model from being compiled.
        return str(error)
    lines = []
    for node in typed.graph.nodes:
        verdict = node.meta["bwsk"]
        if verdict.counted:
            module = next(reversed(node.meta.get("nn_module_stack") or ("",)))
            lines.append(f"{verdict.label:<4} {node.name:<32} {module:<48} {verdict.rationale}")
    return "\n".join(lines)
