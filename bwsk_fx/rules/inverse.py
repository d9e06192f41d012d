"""How a value is rebuilt: the registry of inverses that the planner draws its derivations from.

An inverse rule reads one node of an ATen joint graph and yields `Inverse`s. A rule may first add *witness nodes* to
the graph (LayerNorm's normalised input, a packed mask): values that nobody computed, but that are smaller to keep.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx.rules.targets import Registry

Emit = Callable[[fx.Graph, Sequence[fx.Node]], fx.Node]

# Where a node of a traced graph comes from: the user's line, and the torch-level node.
_ORIGIN = ("stack_trace", "from_node", "nn_module_stack")

_REARRANGEMENTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "select"),
        *("slice", "split", "split_with_sizes", "unbind", "alias", "detach", "clone", "roll", "flip"),
    )
)


@dataclass(frozen=True)
class Inverse:
    """One way to rebuild `head` from `tails`.

    Attributes:
        head: The value that is rebuilt.
        tails: The values it is rebuilt from.
        emit: Appends the computation to a graph, given the nodes that hold `tails` there.
        exact: Whether the rebuilt value has the very bits of the original, and its strides.
        free: Whether it is a view: no memory is moved. A free inverse of a node that is itself a view says that either
            of the two gives the other, all of it: the planner keeps one for both.
        rule: The name of the rule, for reports.
        compiles: Whether a compiler can trace the computation.
        intensive: Whether it runs matrix products, which a budget bounds.
        magnifies: Whether an error in a tail may come out larger, so that the tails have to be the originals.
    """

    head: fx.Node
    tails: tuple[fx.Node, ...]
    emit: Emit
    exact: bool
    free: bool = False
    rule: str = ""
    compiles: bool = True
    intensive: bool = False
    magnifies: bool = False


class WitnessWriter:
    """Adds witness nodes to a joint graph, with their fake values, and knows which of its nodes run backwards."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._backward = {node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)}
        for node in graph.nodes:
            if node.op == "call_function" and not self._backward.isdisjoint(node.all_input_nodes):
                self._backward.add(node)

    def runs_backwards(self, node: fx.Node) -> bool:
        """Whether a node belongs to the backward pass: whether it depends on a tangent."""
        return node in self._backward

    def is_read_backwards(self, node: fx.Node) -> bool:
        """Whether the backward pass reads a value or a view of it."""
        return any(
            self.runs_backwards(user) or (passes_on(user) and self.is_read_backwards(user)) for user in node.users
        )

    def call(self, after: fx.Node, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert `target(*args, **kwargs)` behind `after` and behind nothing later."""
        with self._graph.inserting_after(after):
            node = self._graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        mode = next(leaf.fake_mode for leaf in pytree.tree_leaves(fake_args) if hasattr(leaf, "fake_mode"))
        with mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        node.meta |= {"witness_of": after.name, **{key: after.meta[key] for key in _ORIGIN if key in after.meta}}
        return node


InverseRule = Callable[[fx.Node, WitnessWriter], Iterable[Inverse]]
_INVERSES: Registry[InverseRule] = Registry("inverse rule")
inverts = _INVERSES.register


def inverses_of(node: fx.Node, witnesses: WitnessWriter) -> list[Inverse]:
    """Return the inverses that the registered rule knows for `node`; none without a rule."""
    rule = _INVERSES.get(node.target)
    return [] if rule is None else list(rule(node, witnesses))


def registered_inverses() -> Mapping[Any, InverseRule]:
    """Return the registry, operator to rule, for reports and tests."""
    return dict(_INVERSES)


def calls(target: Callable, *fixed: Any, **kwargs: Any) -> Emit:
    """Return an `Emit` for `target(*tails, *fixed, **kwargs)`."""

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(target, (*tails, *fixed), kwargs)

    return emit


def view_back(node: fx.Node, target: Callable, *fixed: Any) -> Inverse:
    """Return the free, exact inverse of a view: `target(output, *fixed)` is the input again."""
    return Inverse(node.args[0], (node,), calls(target, *fixed), True, True, f"inverse of {node.target}")  # type: ignore[arg-type]


def passes_on(node: fx.Node) -> bool:
    """Whether a node rearranges the elements of its operand, or takes some of them, and changes none."""
    return node.target is operator.getitem or getattr(node.target, "overloadpacket", None) in _REARRANGEMENTS


def memory_order(strides: Sequence[int]) -> list[int]:
    """Return the dimensions of a tensor from the outermost in memory to the innermost."""
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def is_dense(value: torch.Tensor) -> bool:
    """Whether the elements of a tensor fill its memory, each once, in whatever order of dimensions."""
    return value.permute(memory_order(value.stride())).is_contiguous()


def laid_out(value: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return `value` with the given strides, which must be dense; copied unless it has them."""
    if value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)
