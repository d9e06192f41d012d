"""`pipeline_stages`: a captured graph cut into stages for `torch.distributed.pipelining`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.pipelining import PipelineStage

from bwsk_fx.capture import ExampleInputs, GraphGuard, capture
from bwsk_fx.errors import PlanError
from bwsk_fx.graphs import before_each_call
from bwsk_fx.parallel.collectives import contiguous_gradient
from bwsk_fx.parallel.cuts import best_cuts
from bwsk_fx.parallel.loads import loads_of
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.rules.axis_table import extent, tensor_bytes


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        graph: What it runs. It takes the tensors of the stage before in order, then the model's inputs that it reads by
            keyword, and returns the tensors for the next stage. Parameters are the model's, under their names.
        inputs: The model's inputs that it reads, by name.
        load: Its share of the load of all stages.
        sent_bytes: What it sends to the next stage per sample; the same comes back as gradients where there are any.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    load: float
    sent_bytes: int


@dataclass(frozen=True)
class PipelineStages(Sequence[Stage]):
    """The stages of a pipeline, in order.

    Attributes:
        stages: The stages.
    """

    stages: tuple[Stage, ...] = field(repr=False)

    def __getitem__(self, index: Any) -> Any:
        return self.stages[index]

    def __len__(self) -> int:
        return len(self.stages)

    def of_rank(
        self, device: torch.device | str, group: dist.ProcessGroup | None = None, **options: Any
    ) -> PipelineStage:
        """Return this process's stage, which schedules of `torch.distributed.pipelining` take.

        Args:
            device: Where it runs.
            group: One process per stage; the default group where None.
            options: Of `PipelineStage`. `submodule` replaces the stage's graph, by what `fuse_regions` made of it.

        Raises:
            PlanError: The group has another number of processes than there are stages.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if size != len(self):
            raise PlanError(f"{len(self)} stages for {size} processes: call pipeline_stages(…, {size})")
        submodule = options.pop("submodule", self[rank].graph)
        return PipelineStage(submodule, rank, len(self), torch.device(device), group=group, **options)

    def inputs_of(self, index: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of a model's inputs that a stage reads, to be passed to the schedule's `step`."""
        return {name: inputs[name] for name in self[index].inputs}

    def __str__(self) -> str:
        rows = (
            f"stage {index}: {stage.load:.1%} of the load, sends {stage.sent_bytes} bytes per sample"
            for index, stage in enumerate(self)
        )
        return "\n".join(rows)


def pipeline_stages(
    graph: fx.GraphModule | nn.Module, n: int, example_inputs: ExampleInputs | None = None, *, tolerance: float = 0.1
) -> PipelineStages:
    """Cut a model into stages of balanced load, where the least bytes cross.

    The load of a node is its floating-point operations: those of products, convolutions and attention, else one per
    element. Cuts lie between two
    nodes of the execution order; they are optimal for the given tolerance (`bwsk_fx.parallel.cuts`). What a later stage
    reads of an earlier one is handed on from stage to stage. Sizes are read off tensors at hand. Nodes that read one
    parameter stay in one stage.

    Args:
        graph: A captured graph, not fused yet (fuse the stages); or a model, with its inputs.
        n: How many stages.
        example_inputs: For a model, what `capture` takes.
        tolerance: How much larger than the least possible the largest stage may be, if less is moved by that.

    Returns:
        The stages. The last one returns a tensor: the loss, where the model returns one, else its only output, else a
        tuple of its outputs.

    Raises:
        PlanError: The graph is fused already, or has no n - 1 places to cut at.
    """
    if not isinstance(graph, fx.GraphModule):
        if example_inputs is None:
            raise PlanError("pipeline_stages needs example inputs to capture a model: pass them, or a captured graph")
        graph = capture(graph, example_inputs)
    if any(isinstance(module, ReversibleRegion) for module in graph.modules()):
        raise PlanError("this graph is fused already: call pipeline_stages first, then fuse_regions on each stage")
    return _Cutter(graph, n, tolerance).stages()


class _Cutter:
    def __init__(self, graph: fx.GraphModule, n: int, tolerance: float) -> None:
        self._module = graph
        self._n = n
        self._nodes = [node for node in graph.graph.nodes if _runs(node)]
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._loads = loads_of(graph, self._nodes)
        self._tolerance = tolerance

    def stages(self) -> PipelineStages:
        moved = self._moved()
        cuts = best_cuts(self._loads, moved, self._n, self._tolerance) if self._n > 0 else None
        if cuts is None:
            free = sum(map(math.isfinite, moved))
            raise PlanError(
                f"{self._n} stages need {self._n - 1} cuts, and this graph can be cut in {free} places: elsewhere a "
                "parameter is read on both sides (tied weights), or something other than tensors crosses"
            )
        bounds = [0, *cuts, len(self._nodes)]
        total = sum(self._loads)
        found = []
        for index, (start, stop) in enumerate(pairwise(bounds)):
            received = self._crossing(start) if index else []
            sent = self._crossing(stop) if index < self._n - 1 else []
            part = _StageWriter(self._module, self._nodes[start:stop], received, sent, last=index == self._n - 1)
            load = sum(self._loads[start:stop]) / total
            found.append(Stage(part.graph_module(), tuple(part.inputs), load, sum(map(_bytes, sent))))
        return PipelineStages(tuple(found))

    def _last_use(self, node: fx.Node) -> int:
        return max((self._place.get(user, len(self._nodes)) for user in _real_users(node)), default=-1)

    def _crossing(self, place: int) -> list[fx.Node]:
        """Return the values made before a place and read from there on."""
        return [node for node in self._nodes[:place] if self._last_use(node) >= place]

    def _moved(self) -> list[float]:
        """Return what a cut before each node but the first moves; infinity where there can be none."""
        change = [0.0] * (len(self._nodes) + 1)
        for index, node in enumerate(self._nodes):
            last = min(self._last_use(node), len(self._nodes) - 1)
            if last > index:
                change[index + 1] += _bytes(node)
                change[last + 1] -= _bytes(node)
        blocked = [0] * (len(self._nodes) + 1)
        for first, last in self._inseparable():
            blocked[first + 1] += 1
            blocked[last + 1] -= 1
        moved, live, held = [], 0.0, 0
        for index in range(1, len(self._nodes)):
            live += change[index]
            held += blocked[index]
            moved.append(math.inf if held else live)
        return moved

    def _inseparable(self) -> Iterator[tuple[int, int]]:
        """Yield the first and last place of what has to stay in one stage."""
        uses: dict[int, list[int]] = {}
        for node in self._module.graph.nodes:
            places = (
                [self._place[node]]
                if node in self._place
                else [self._place[user] for user in _placed(node, self._place)]
            )
            for parameter in _parameters(self._module, node):
                uses.setdefault(id(parameter), []).extend(places)
        for places in uses.values():
            if places:
                yield min(places), max(places)
        for node, index in self._place.items():
            if not isinstance(node.meta.get("val"), torch.Tensor):
                last = min(self._last_use(node), len(self._nodes) - 1)
                if last > index:
                    yield index, last


class _StageWriter:
    """Copies the nodes of one stage into a graph of its own."""

    def __init__(
        self,
        module: fx.GraphModule,
        nodes: Sequence[fx.Node],
        received: Sequence[fx.Node],
        sent: Sequence[fx.Node],
        *,
        last: bool,
    ) -> None:
        self._module = module
        self._graph = fx.Graph()
        self._at: dict[fx.Node, Any] = {}
        self.inputs: list[str] = []
        for node in received:
            self._add_placeholder(node)
        for node in received:
            if node.meta["val"].is_floating_point():
                self._at[node] = self._graph.call_function(contiguous_gradient, (self._at[node],))
                self._at[node].meta = dict(node.meta)
        for node in nodes:
            self._copy(node)
        output = tuple(map(self._contiguous, sent)) if not last else self._last_output()
        self._graph.output(output)

    def graph_module(self) -> fx.GraphModule:
        """Return the stage; its state dict has the model's names for the parameters and buffers that it reads."""
        result = fx.GraphModule(self._module, self._graph, class_name="Stage")
        result.train(self._module.training)
        for hook in self._module._forward_pre_hooks.values():
            if isinstance(hook, GraphGuard):
                before_each_call(
                    result,
                    hook if {name for _, (name, _) in hook.symbols} <= {*self.inputs} else replace(hook, conditions=()),
                )
        return result

    def _add_placeholder(self, node: fx.Node) -> None:
        first = next((made for made in self._graph.nodes if made.op != "placeholder"), None)
        with self._graph.inserting_before(first) if first is not None else nullcontext():
            self._at[node] = self._graph.placeholder(node.name)
        self._at[node].meta = dict(node.meta)

    def _copy(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            self._obtain(operand)
        copied = self._graph.node_copy(node, self._at.__getitem__)
        self._at[node] = copied

    def _obtain(self, node: fx.Node) -> Any:
        """Return what stands for a node in this stage: attributes are read anew, sizes off a tensor that is here."""
        if node.op == "placeholder" and node not in self._at:
            self._add_placeholder(node)
            self.inputs.append(str(node.target))
        if node not in self._at:
            value = node.meta.get("val")
            source = self._sized(value) if isinstance(value, torch.SymInt) else None
            if source is not None:
                tensor, dim = source
                self._at[node] = self._graph.call_method("size", (self._at[tensor], dim))
                self._at[node].meta = {"val": value, "nn_module_stack": {}}
            else:
                self._copy(node)
        return self._at[node]

    def _contiguous(self, node: fx.Node) -> fx.Node:
        """Return a value as processes can send it."""
        result = self._graph.call_method("contiguous", (self._obtain(node),))
        result.meta = dict(node.meta) | {"val": node.meta["val"].contiguous()}
        return result

    def _sized(self, value: torch.SymInt) -> tuple[fx.Node, int] | None:
        wanted = extent(value)
        for node, here in self._at.items():
            there = node.meta.get("val")
            given = isinstance(here, fx.Node) and (here.op == "placeholder" or here.target is contiguous_gradient)
            if given and isinstance(there, torch.Tensor):
                for dim, size in enumerate(there.shape):
                    if extent(size) == wanted:
                        return node, dim
        return None

    def _last_output(self) -> Any:
        output = self._module.graph.output_node().args[0]
        return fx.node.map_arg(_tensors_returned(output), self._obtain)


def _tensors_returned(output: Any) -> Any:
    """Return the tensors of a model's output: the loss, else the only one, else all."""
    given: dict[Any, Any]
    if isinstance(output, fx.Node) and isinstance(output.target, type):
        given = {**dict(enumerate(output.args)), **output.kwargs}
    elif isinstance(output, Mapping):
        given = {**output}
    else:
        given = dict(enumerate(output)) if isinstance(output, (tuple, list)) else {0: output}
    nodes = {name: item for name, item in given.items() if isinstance(item, fx.Node)}
    if "loss" in nodes:
        return nodes["loss"]
    return next(iter(nodes.values())) if len(nodes) == 1 else tuple(nodes.values())


def _runs(node: fx.Node) -> bool:
    """Whether a node has a place of its own. Attributes, sizes and the output's class go where they are read."""
    if node.op in ("placeholder", "get_attr", "output") or isinstance(node.target, type):
        return False
    return not isinstance(node.meta.get("val"), (int, torch.SymInt)) or node.is_impure()


def _real_users(node: fx.Node) -> list[fx.Node]:
    """Return the users of a value, those of the output's class included; sizes read off it do not count."""
    found = []
    for user in node.users:
        if isinstance(user.target, type):
            found += list(user.users)
        elif user.op == "output" or _runs(user):
            found.append(user)
    return found


def _placed(node: fx.Node, place: Mapping[fx.Node, int]) -> list[fx.Node]:
    return [user for user in node.users if user in place]


def _parameters(module: fx.GraphModule, node: fx.Node) -> list[torch.Tensor]:
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        value = _attribute(module, str(node.target))
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return tensor_bytes(value) if isinstance(value, torch.Tensor) else 0


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)
