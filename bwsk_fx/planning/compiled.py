"""A partition through Inductor: its forward and backward module as callables that run generated code.

The modules themselves stay as they are, to be read. Inductor gets a copy of each that computes and nothing else: views
of what is computed, or of an input, that a module returns are taken afterwards by PyTorch's own operators. What
aliases what is then the same as in eager mode, version counters included, and no value is written out twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError, first_line
from bwsk_fx.planning.sizes import is_symbolic

aten = torch.ops.aten


@dataclass(frozen=True)
class CompiledGraph:
    """An ATen graph as generated code, followed by the views that it returns.

    Attributes:
        kernels: Generated code; takes a list of inputs, empties it, and frees each after its last use.
        views: Takes the results of `kernels`, then the inputs in `passed`; returns what the graph returns.
        passed: Places of the inputs that are returned, or of which a view is.
    """

    kernels: Callable[[list[Tensor]], Sequence[Tensor]]
    views: fx.GraphModule
    passed: tuple[int, ...]

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Run the graph and empty `inputs`."""
        passed = [inputs[place] for place in self.passed]
        computed = self.kernels(inputs)
        inputs.clear()
        return self.views(*computed, *passed)

    @property
    def code(self) -> str:
        """The source that Inductor generated."""
        return private.generated_code(self.kernels)


@dataclass(frozen=True)
class CompiledForward:
    """A forward module as generated code: takes the primals; returns `(outputs, kept)`."""

    graph: CompiledGraph

    def __call__(self, *primals: Tensor) -> Any:
        """Run the forward pass."""
        return self.graph([*primals])

    @property
    def code(self) -> str:
        """The source that Inductor generated."""
        return self.graph.code


def compile_with_inductor(
    forward: fx.GraphModule, backward: fx.GraphModule, region: str
) -> tuple[CompiledForward, CompiledGraph]:
    """Compile both modules of a partition.

    The callables take and return what the modules do, with the same strides and aliases. Random operators draw from
    PyTorch's generators in eager execution's order, so that masks are eager's; a draw that nothing reads is left out.

    Args:
        forward: As `partition` writes it; it stays as it is.
        backward: Likewise.
        region: The region's name, for errors.

    Returns:
        The forward callable, and the backward callable, which empties the list that it is given.

    Raises:
        PlanError: Inductor cannot compile a module: there is no C++ compiler, or an operator is not supported.
    """
    first = compile_graph(forward.graph, f"forward pass of region {region}")
    second = compile_graph(unboxed(backward.graph, forward.graph), f"backward pass of region {region}")
    return CompiledForward(first), second


def compile_graph(graph: fx.Graph, name: str) -> CompiledGraph:
    """Compile a graph of ATen calls that returns tensors of any nesting.

    Args:
        graph: Its placeholders are tensors and symbolic sizes; nodes have recorded values.
        name: What it is, for errors.

    Raises:
        PlanError: Inductor cannot compile it.
    """
    views = _returned_views(graph)
    read = [node for kind in (views, [graph.output_node()]) for user in kind for node in user.all_input_nodes]
    bases = [node for node in dict.fromkeys(read) if node not in views]
    inputs = graph.find_nodes(op="placeholder")
    computed = [node for node in bases if node.op != "placeholder"]
    passed = [node for node in bases if node.op == "placeholder"]
    return CompiledGraph(
        _kernels(graph, computed, name) if computed else _nothing,
        _views_module(graph, views, [*computed, *passed]),
        tuple(map(inputs.index, passed)),
    )


def _nothing(_: list[Tensor]) -> Sequence[Tensor]:
    return ()


def unboxed(backward: fx.Graph, forward: fx.Graph) -> fx.Graph:
    """Return a copy of a backward graph with a placeholder for each entry that it pops from its list.

    The first entries look as the forward graph returns them: what it copied may lie otherwise than it was traced.
    """
    flat = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    kept: Sequence[fx.Node] = forward.output_node().args[0][1]  # type: ignore[index, assignment]
    popped = backward.find_nodes(op="call_method", target="pop")
    looks = dict(zip(popped, [*kept, *popped[len(kept) :]], strict=True))
    for node in backward.nodes:
        if node in looks:
            at[node] = flat.placeholder(node.name)
            at[node].meta = dict(looks[node].meta)
        elif node.op != "placeholder":
            at[node] = flat.node_copy(node, at.__getitem__)
    return flat


def _returned_views(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes, in graph order, that only views separate from the output."""
    found: set[fx.Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if _is_view(node) and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _is_view(node: fx.Node) -> bool:
    """Whether a node computes nothing that generated code has to: views, and sizes."""
    if node.op == "call_function" and is_symbolic(node.meta.get("val")):
        return True
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return node.op == "call_function" and getattr(node.target, "is_view", False)


def _views_module(graph: fx.Graph, views: Sequence[fx.Node], bases: Sequence[fx.Node]) -> fx.GraphModule:
    written = fx.Graph()
    at = {base: written.placeholder(base.name) for base in bases}
    for node in (*views, graph.output_node()):
        at[node] = written.node_copy(node, at.__getitem__)
    written.lint()
    return fx.GraphModule(torch.nn.Module(), written, class_name="ReturnedViews")


def _kernels(graph: fx.Graph, results: Sequence[fx.Node], name: str) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Let Inductor generate code that computes `results`, which are no views."""
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    inputs = [value.detach() if isinstance(value, Tensor) else value for value in values]
    try:
        with torch.no_grad(), private.without_autocast():
            traced = private.trace_for_inductor(_computing(graph, results), inputs)
            _require_recorded(traced.graph, results)
            _keep_copies(traced.graph)
            return private.compile_boxed(traced, inputs)
    except Exception as error:
        raise PlanError(
            f"Inductor cannot compile the {name} ({type(error).__name__}: {first_line(error)}); use compiler='eager'"
        ) from error


def _computing(graph: fx.Graph, results: Sequence[fx.Node]) -> fx.GraphModule:
    written = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    written.graph_copy(graph, at)
    written.output(tuple(map(at.__getitem__, results)))
    return fx.GraphModule(torch.nn.Module(), written)


def _require_recorded(traced: fx.Graph, results: Sequence[fx.Node]) -> None:
    """Generated code does not look at dtypes: what one half returns in another dtype, the other would misread."""
    for node, found in zip(results, traced.output_node().args[0], strict=True):  # type: ignore[arg-type]
        one, other = (value.meta["val"] for value in (found, node))
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise TypeError(
                f"node {node.name} ({node.target}) is {tuple(one.shape)} {one.dtype} there, and was recorded as "
                f"{tuple(other.shape)} {other.dtype}"
            )


def _keep_copies(graph: fx.Graph) -> None:
    """Let a returned copy of a part be one: Inductor takes a clone with its operand's strides for the operand."""
    for node in graph.output_node().all_input_nodes:
        if node.target is aten.clone.default and node.meta["val"].stride() == node.args[0].meta["val"].stride():  # type: ignore[union-attr]
            node.target, node.kwargs = aten.lift_fresh_copy.default, {}
