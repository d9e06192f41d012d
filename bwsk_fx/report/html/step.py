"""A training step of a rewritten graph before it is run: its plans, what budgets buy, and what is alive when.

Everything here happens on fake tensors. Nothing is computed, and the rewritten graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from bwsk_fx import _torch_private as private
from bwsk_fx._storage_watch import StorageRecorder
from bwsk_fx.errors import PlanError, first_line
from bwsk_fx.graphs import with_graph
from bwsk_fx.measure import Timeline, loss_of
from bwsk_fx.passes.fuse_regions import CONTAINER
from bwsk_fx.planner import Foresight, choose, foresee
from bwsk_fx.planning.allocate import Totals
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.program import Program
from bwsk_fx.report.frontier import Frontier, frontier_of
from bwsk_fx.report.html.opened import regions_of
from bwsk_fx.report.saved import RegionPlan
from bwsk_fx.reversible import Programs, ReversibleRegion
from bwsk_fx.rules.inverse_linear import stands_for
from bwsk_fx.signature import tensors_of


@dataclass(frozen=True)
class ForeseenStep:
    """What a training step would do.

    Attributes:
        options: What its plans were asked for.
        plans: The plan of each region, in execution order.
        totals: What the step takes, as modelled.
        frontier: What other budgets would buy.
        conventional: Live bytes over the step of the graph without regions, gradients of parameters left out.
        reversible: The same with regions.
    """

    options: PlanOptions
    plans: tuple[RegionPlan, ...]
    totals: Totals
    frontier: Frontier
    conventional: Timeline
    reversible: Timeline


def foresee_step(graph: fx.GraphModule, inputs: Mapping[str, Any]) -> ForeseenStep:
    """Plan a rewritten graph for some inputs, and follow both ways of running it, on fake tensors.

    Args:
        graph: What `fuse_regions` returned.
        inputs: Arguments of the step by name, read for shapes and dtypes only.

    Raises:
        PlanError: The step cannot be run on fake tensors, or nothing fits its bound on memory.
    """
    twin = _twin(graph)
    foresight = foresee(twin, (), inputs)
    options = next(iter(regions_of(graph).values())).options
    programs = _chosen(foresight, options)
    for foreseen, program in zip(foresight.regions, programs, strict=True):
        foreseen.region.choose(foreseen.kind, program)
    plans = [program.plan for program in programs]
    named = (RegionPlan(foreseen.region.name, plan) for foreseen, plan in zip(foresight.regions, plans, strict=True))
    return ForeseenStep(
        options,
        tuple(named),
        Totals.of(plans, foresight.outside_bytes),
        frontier_of(foresight, options),
        _timeline(twin, inputs, opened=True),
        _timeline(twin, inputs, opened=False),
    )


def _twin(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with the same modules, whose regions have plans of their own."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    programs = Programs()
    container = nn.Module()
    for name, region in regions_of(graph).items():
        container.add_module(name, ReversibleRegion(name, region.subgraph, region.attributes, region.options, programs))
    return with_graph(graph, copy, {CONTAINER: container})


def _chosen(foresight: Foresight, options: PlanOptions) -> list[Program]:
    if options.plan is not None:
        return [one.prospect.from_file(options.plan, one.region.name) for one in foresight.regions]
    candidates = foresight.candidates()
    chosen = choose(candidates, options, foresight.outside_bytes)
    return [own[index] for own, index in zip(candidates, chosen, strict=True)]


def _timeline(graph: fx.GraphModule, inputs: Mapping[str, Any], *, opened: bool) -> Timeline:
    """Follow the storages of a step on fake tensors; `opened` runs the subgraphs of regions as they are."""
    with _fakes(graph, inputs) as arguments:
        try:
            return _recorded(_Run(graph, opened), arguments)
        except Exception as error:
            at = f"({type(error).__name__}: {first_line(error)})"
            raise PlanError(f"the memory of a step cannot be followed on fake tensors {at}") from error


def _recorded(run: _Run, arguments: list[Any]) -> Timeline:
    graph: Any = run.module
    known = [tensor for tensor in (*graph.parameters(), *graph.buffers(), *arguments) if isinstance(tensor, Tensor)]
    with StorageRecorder(tensor.untyped_storage()._cdata for tensor in known) as recorder:
        loss = loss_of(run.run(*arguments))
        recording = recorder.recording
        recording.forward_events = len(recording.events)
        loss.backward()
        del loss
    gradients = (parameter.grad for parameter in graph.parameters() if parameter.grad is not None)
    kept = {recorder.serial_of(gradient) for gradient in gradients}
    return Timeline(*_without(recording.events, kept, recording.forward_events))


def _without(events: list[tuple[int, int]], kept: set[int | None], forward: int) -> tuple[tuple[int, ...], int]:
    """Return live bytes without some storages, and how many events are the forward pass's."""
    live, level, before = [], 0, 0
    for place, (serial, size) in enumerate(events):
        if serial not in kept:
            level += size
            live.append(level)
            before += place < forward
    return tuple(live), before


@contextmanager
def _fakes(graph: fx.GraphModule, inputs: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Put a graph on fake tensors, and yield its arguments in order."""
    mode = private.fake_mode()
    own = {name: private.fake_tensor(mode, tensor) for name, tensor in tensors_of(graph).items()}
    named = [inputs[str(node.target)] for node in graph.graph.find_nodes(op="placeholder") if node.target in inputs]
    for name, tensor in tensors_of(graph).items():
        stands_for(own[name], tensor)
        # A fake tensor comes with a fake gradient where there is a real one; a step begins without any.
        own[name].grad = None
    with mode, private.swapped_parameters(graph, own):
        yield [private.fake_tensor(mode, value) if isinstance(value, Tensor) else value for value in named]


class _Run(fx.Interpreter):
    """Runs a graph node by node, and frees what is no longer read; regions opened where that is wanted."""

    def __init__(self, graph: fx.GraphModule, opened: bool) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self._opened = opened

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if self._opened and isinstance(module, ReversibleRegion):
            return module.subgraph(*args)
        return super().call_module(target, args, kwargs)
