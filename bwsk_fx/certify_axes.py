"""Certification of axis claims: run each node on the shards of real tensors, merge as claimed, and compare.

A shard of an axis has its facts and no others. A node runs on a shard with the other facts replaced: by values drawn
at random where the claim is that they do not matter (MAP), by neutral ones where they come in later (REDUCE, JOIN).
Sizes and everything random stay as they were, which every shard knows or can draw again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bwsk_fx.arguments import require_graph
from bwsk_fx.axes import Step, follow_axes
from bwsk_fx.axis_facts import Facts
from bwsk_fx.axis_trial import SeededCall, Trial, copied
from bwsk_fx.capture import ExampleInputs
from bwsk_fx.certify import bound_inputs, run_without_trace
from bwsk_fx.errors import RuleError
from bwsk_fx.report.axis_certificate import AxisCertificate, AxisCertificates
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.rules.axis_table import extent


def certify_axes(graph: fx.GraphModule, example_inputs: ExampleInputs, *, shards: int = 2) -> AxisCertificates:
    """Run every axis claim of a graph on shards of real activations.

    Everything runs in float64. A MAP holds where the elements of each shard come out as in the unsharded run while the
    facts of all other shards are random; a REDUCE or JOIN where the merged partial results are the unsharded one. A
    BARRIER claims nothing that could be wrong; it is `cautious` where shards do not need each other after all.

    Args:
        graph: A graph from `bwsk_fx.capture`, before regions are fused.
        example_inputs: What it is called with, as for `capture`.
        shards: Into how many parts each axis is cut.

    Returns:
        One certificate per claim. It prints, and has `to_json`.

    Raises:
        RuleError: The graph has fused regions, or a node without a value to read sizes from.
        CaptureError: The example inputs do not fit the graph.
    """
    require_graph(graph)
    if any(isinstance(module, ReversibleRegion) for module in graph.modules()):
        raise RuleError("the graph has fused regions: certify its axes before fuse_regions")
    steps, axes = follow_axes(graph)
    wide = _in_float64(graph)
    inputs = {name: _widened(value) for name, value in bound_inputs(graph, example_inputs).items()}
    certifier = _Certifier(wide, {step.node.name: step for step in steps}, Facts(axes, _symbols(graph, inputs)), shards)
    run_without_trace(certifier, wide, inputs)
    unknown = tuple(step.node.name for step in steps if step.unknown)
    return AxisCertificates(tuple(certifier.found), unknown, sum(bool(step.claims) for step in steps))


def _in_float64(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph with all of its numbers, and casts to single precision, in float64."""
    wide = copy.deepcopy(graph).double()
    for node in wide.graph.nodes:
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
        node.args, node.kwargs = pytree.tree_map_only(torch.dtype, _wide_dtype, (node.args, dict(node.kwargs)))
    return wide


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float32 else dtype


def _widened(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _symbols(graph: fx.GraphModule, inputs: Mapping[str, Any]) -> dict[Any, int]:
    """Return what the symbols of the captured sizes are in these inputs."""
    found: dict[Any, int] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        value, real = node.meta.get("val"), inputs.get(str(node.target))
        if isinstance(value, Tensor) and isinstance(real, Tensor):
            found |= {extent(size): length for size, length in zip(value.shape, real.shape, strict=True)}
    return {symbol: size for symbol, size in found.items() if not isinstance(symbol, int)}


class _Certifier(fx.Interpreter):
    """Runs a graph and tries the claims of each node on the way, with the values that reach it."""

    def __init__(self, graph: fx.GraphModule, steps: Mapping[str, Step], facts: Facts, shards: int) -> None:
        super().__init__(graph)
        # Errors are ours, and name the node themselves.
        self.extra_traceback = False
        self.found: list[AxisCertificate] = []
        self._steps, self._facts, self._shards = steps, facts, shards

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and try its claims."""
        step = self._steps.get(n.name)
        if step is None or n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target = self.fetch_attr(n.target) if n.op == "call_module" else n.target  # type: ignore[arg-type]
        call = SeededCall(n.op, target, copied(args), copied(kwargs))
        trial = Trial(step, n, call, self._facts, self._shards)
        self.found += map(trial.certificate, step.claims)
        return super().run_node(n)
