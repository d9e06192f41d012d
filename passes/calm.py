"""`Calm`: every node learns what it does on each of its axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bwsk_fx.calm import Analysis
from bwsk_fx.passes.pipeline import Pass, PassResult


@dataclass(frozen=True)
class Calm(Pass):
    """Analyse which parts of the graph run without coordination along each axis.

    Each node, those inside fused regions too, gets its `AxisFact`s as `meta["calm"]`; the graph module gets the
    `CalmReport` as `meta["calm"]`. The graph stays as it is.
    """

    name: ClassVar[str] = "calm"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Analyse the graph and store what was found."""
        analysis = Analysis.of(graph_module)
        for step in analysis.steps:
            step.node.meta["calm"] = analysis.facts(step)
        graph_module.meta["calm"] = analysis.report()
        return PassResult(graph_module, False)
