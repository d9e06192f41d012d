"""The joint graph of a region, read for planning: what belongs to which pass, and what the backward pass needs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.planning.constants import make_numbers
from bwsk_fx.planning.gradients import fuse_gradients
from bwsk_fx.planning.simplify import compute_marked_views, drop_no_ops, read_less
from bwsk_fx.planning.sizes import as_number
from bwsk_fx.planning.views import base_of

aten = torch.ops.aten
# Tells a random call from its likes while common subexpressions are merged.
_OCCURRENCE = "occurrence"


@dataclass(frozen=True)
class JointGraph:
    """Forward and backward of one region in one ATen graph, as AOTAutograd traces it.

    Attributes:
        graph: The graph, common subexpressions merged.
        conventional: The graph as eager execution runs it, nothing merged.
        primals: Placeholders for the region's inputs and parameters.
        tangents: Placeholders for the gradients of its outputs.
        forward_outputs: What the forward pass returns; sizes among it are numbers.
        gradients: What the backward pass returns, one per primal; None where none is wanted.
        static_primals: The primals that are parameters or buffers.
        backward: The nodes that depend on a tangent.
        static: The nodes that depend on static primals alone.
        rewritten: The primals that get another value when the forward pass is over.
    """

    graph: fx.Graph
    conventional: fx.Graph
    primals: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    forward_outputs: tuple[Any, ...]
    gradients: tuple[fx.Node | None, ...]
    static_primals: frozenset[fx.Node]
    backward: frozenset[fx.Node]
    static: frozenset[fx.Node]
    rewritten: frozenset[fx.Node] = frozenset()

    @property
    def at_hand(self) -> frozenset[fx.Node]:
        """The primals that the backward pass may read without keeping them: what they were, they still are."""
        return self.static_primals - self.rewritten

    def needed(self) -> list[fx.Node]:
        """Return the forward values that the backward pass uses, in graph order."""
        used = {operand for node in self.backward for operand in node.all_input_nodes}
        used |= {gradient for gradient in self.gradients if gradient is not None}
        return [node for node in self.graph.nodes if node in used and node not in self.backward]

    def tangents_read(self) -> tuple[frozenset[int], ...]:
        """Return, per gradient, the places of the tangents that it depends on."""
        reached = [depending_on(self.graph, [tangent]) for tangent in self.tangents]
        return tuple(
            frozenset(place for place, nodes in enumerate(reached) if gradient in nodes) for gradient in self.gradients
        )

    def conventional_bytes(self) -> int:
        """Return the bytes that eager execution saves for the backward pass, parameters excluded.

        A saved view keeps the whole tensor that it is a view of.
        """
        tangents = [node for node in _placeholders(self.conventional) if is_tangent(node)]
        backward = depending_on(self.conventional, tangents)
        own = {node.name for node in self.static_primals}
        read = {operand for node in backward for operand in node.all_input_nodes} - backward
        return sum(nbytes(base) for base in set(map(base_of, read)) if base.name not in own)

    def forward_nodes(self) -> list[fx.Node]:
        """Return the calls that do not depend on a tangent, in graph order."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node not in self.backward]


def wrap_output(output: torch.Tensor) -> torch.Tensor:
    """Make a traced function's output a tensor of its own in AOTAutograd's eyes, whatever it is a view of.

    AOTAutograd changes its calling convention for outputs that alias inputs or each other. `read_joint` takes the
    wrapper off again.
    """
    return aten._unsafe_view(output, output.shape)


def wrap_outputs(graph: fx.Graph, count: int) -> None:
    """Do for the first outputs of a traced graph what `wrap_output` does while it is traced."""
    output = graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    for place, node in enumerate(returned[:count]):
        if isinstance(node, fx.Node) and isinstance(node.meta["val"], torch.Tensor):
            with graph.inserting_before(output):
                returned[place] = graph.call_function(aten._unsafe_view.default, (node, list(node.meta["val"].shape)))
            returned[place].meta = dict(node.meta)
    output.args = (tuple(returned),)


def read_joint(
    joint: fx.GraphModule,
    num_forward_outputs: int,
    static_primal_indices: Iterable[int],
    rewritten_primal_indices: Iterable[int] = (),
) -> JointGraph:
    """Classify the nodes of a traced joint graph.

    Args:
        joint: A graph module as `torch_private.trace_joint` returns it.
        num_forward_outputs: How many of its outputs belong to the forward pass.
        static_primal_indices: Which primals are parameters or buffers.
        rewritten_primal_indices: Which primals the caller writes into when the forward pass is over.

    Raises:
        PlanError: The graph holds something other than ATen calls.
    """
    make_numbers(joint)
    fuse_gradients(joint)
    compute_marked_views(joint.graph)
    drop_no_ops(joint.graph)
    graph = _merge_equal_calls(joint.graph)
    read_less(graph)
    placeholders = _placeholders(graph)
    primals = tuple(node for node in placeholders if not is_tangent(node))
    tangents = tuple(filter(is_tangent, placeholders))
    _require_aten(graph)
    outputs = pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda leaf: leaf is None)
    static_primals = frozenset(primals[index] for index in static_primal_indices)
    dynamic_primals = [node for node in primals if node not in static_primals]
    forward_outputs = tuple(map(_unwrapped, outputs[:num_forward_outputs]))
    _share_versions(graph)
    backward = depending_on(graph, tangents)
    return JointGraph(
        graph,
        joint.graph,
        primals,
        tangents,
        forward_outputs,
        tuple(outputs[num_forward_outputs:]),
        static_primals,
        frozenset(backward),
        frozenset(graph.nodes) - backward - depending_on(graph, dynamic_primals) - _random(graph),
        frozenset(primals[index] for index in rewritten_primal_indices),
    )


def nbytes(node: fx.Node) -> int:
    """Return the bytes of a node's tensor, of the sizes that it was traced for; 0 for numbers, None and tuples."""
    value = node.meta.get("val")
    return as_number(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


def is_constant(node: fx.Node) -> bool:
    """Whether the node's value is a number or None, known when the graph is traced."""
    return "val" in node.meta and (node.meta["val"] is None or isinstance(node.meta["val"], (int, float)))


def is_random(node: fx.Node) -> bool:
    """Whether running the node again may give something else, or make other devices wait for a call they do not make.

    Nothing is known of operators that are not PyTorch's own.
    """
    if private.is_collective(node.target) or private.is_custom_operator(node.target):
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    # Fused attention carries the tag for its dropout alone.
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    dropout = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return bool(dropout != 0.0)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def is_tangent(node: fx.Node) -> bool:
    """Whether a placeholder of a joint graph is the gradient of an output."""
    return "tangents" in str(node.target)


def depending_on(graph: fx.Graph, sources: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the sources, and the calls that depend on one of them."""
    reached = set(sources)
    for node in graph.nodes:
        if node.op == "call_function" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _random(graph: fx.Graph) -> set[fx.Node]:
    return depending_on(graph, [node for node in graph.nodes if is_random(node)])


def _require_aten(graph: fx.Graph) -> None:
    for node in graph.nodes:
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if node.op == "call_function" and not known:
            raise PlanError(
                f"node {node.name} calls {node.target}, which is no ATen operator, at {_source_of(node)}; "
                "a region holds ATen operators only: leave the module out of it with granularity='s-run'"
            )
        if node.op not in ("call_function", "placeholder", "output"):
            raise PlanError(
                f"node {node.name} is a {node.op} of {node.target}, a tensor that is neither an input nor a parameter "
                f"of the region, at {_source_of(node)}: make it a buffer of its module (register_buffer), or leave the "
                "module out of regions with granularity='s-run'"
            )


def _merge_equal_calls(graph: fx.Graph) -> fx.Graph:
    """Return a copy with common subexpressions merged; random calls stay apart, whatever they are called."""
    for index, node in enumerate(filter(is_random, graph.nodes)):
        node.update_kwarg(_OCCURRENCE, index)
    merged = private.merge_common_subexpressions(graph)
    for node in (*graph.nodes, *merged.nodes):
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != _OCCURRENCE}
    return merged


def _share_versions(graph: fx.Graph) -> None:
    """Turn `_unsafe_view`, whose result does not show that it is written into, into an ordinary view.

    Otherwise a caller that writes into a region's output could change a saved tensor unnoticed.
    """
    for node in graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        node.target = aten.view.default


def _unwrapped(output: Any) -> Any:
    # `wrap_output` kept AOTAutograd from seeing an alias; at run time the aliased tensor itself is the output.
    if isinstance(output, fx.Node) and output.target is aten._unsafe_view.default:
        return output.args[0]
    return output


def _source_of(node: fx.Node) -> str:
    return node.stack_trace or "an unknown line"
