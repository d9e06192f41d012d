"""Symbolic sizes: numbers to plan with, and calls that compute them in a graph that runs for any size.

While a graph is planned, its sizes stand among the arguments of calls as `SymInt`s, and no node computes any.
`inline_sizes` brings a traced graph into this form. `bind_sizes` puts nodes in their place again, computed from the
placeholders of the plain symbols.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError

Symbols = Mapping[Any, fx.Node]


def is_symbolic(value: object) -> bool:
    """Whether a value is a number that stands for others, too."""
    return isinstance(value, (SymInt, SymFloat, SymBool))


def has_symbolic_sizes(tensor: Tensor) -> bool:
    """Whether a size or a stride of a fake tensor is symbolic."""
    return any(map(is_symbolic, (*tensor.shape, *tensor.stride())))


def symbols_of(placeholders: Iterable[fx.Node]) -> dict[Any, fx.Node]:
    """Return which symbol is the value of which node; a symbol has the first."""
    found: dict[Any, fx.Node] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if is_symbolic(value):
            found.setdefault(private.expression_of(value), node)
    return found


def as_numbers(tree: Any) -> Any:
    """Return a tree of fake tensors and numbers with the sizes that it was traced for; no guard is added."""
    return pytree.tree_map(as_number, tree)


def as_number(leaf: Any) -> Any:
    """Return a fake tensor or a number likewise."""
    if is_symbolic(leaf):
        return private.hint_of(leaf)
    if not isinstance(leaf, Tensor) or not has_symbolic_sizes(leaf):
        return leaf
    shape, strides = (tuple(map(as_number, own)) for own in (leaf.shape, leaf.stride()))
    with leaf.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(shape, strides, dtype=leaf.dtype, device=leaf.device)


def inline_sizes(graph: fx.Graph) -> None:
    """Put symbolic numbers in the place of the nodes that compute them.

    Raises:
        PlanError: A size is not known from the inputs' sizes.
    """
    known = set(symbols_of(graph.find_nodes(op="placeholder")))
    for node in graph.nodes:
        if any(not private.symbols_in(value) <= known for value in symbolic_numbers_of(node)):
            raise PlanError(
                f"the size of {node.name} ({node.target}) depends on data, at {node.stack_trace or 'an unknown line'}; "
                "a plan needs sizes that follow from those of the inputs: let Dynamo break the graph there "
                "(capture_dynamic_output_shape_ops = False), or compile the parts around it"
            )
    # Calls are told apart by the objects in their arguments.
    same: dict[Any, Any] = {}
    inlined = {node: same.setdefault(private.expression_of(value), value) for node, value in _symbolic_nodes(graph)}
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda leaf: inlined.get(leaf, leaf))
    for node in reversed(list(inlined)):
        if node.op != "placeholder":
            graph.erase_node(node)


def _symbolic_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any]]:
    return ((node, node.meta["val"]) for node in graph.nodes if is_symbolic(node.meta.get("val")))


def symbolic_numbers_of(node: fx.Node) -> Iterator[Any]:
    """Yield the symbolic numbers in a node's value."""
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        yield from filter(is_symbolic, (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,))


@contextmanager
def sizes_in_arguments() -> Iterator[None]:
    """Let symbolic numbers stand among the arguments of calls, of which PyTorch 2.13 warns, until they are bound."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Raw Sym")
        yield


def bind_sizes(graph: fx.Graph, symbols: Symbols) -> None:
    """Replace symbolic numbers among the arguments of calls by nodes that compute them.

    Args:
        graph: Any.
        symbols: The nodes of the graph whose values the symbols are.
    """
    writer = _SizeWriter(graph, symbols)
    for node in list(graph.nodes):
        writer.before = node
        node.args, node.kwargs = (fx.node.map_aggregate(part, writer.bound) for part in (node.args, node.kwargs))  # type: ignore[assignment]


class _SizeWriter:
    """Writes nodes for symbolic numbers in front of where they are read first."""

    def __init__(self, graph: fx.Graph, symbols: Symbols) -> None:
        self.before = graph.output_node()
        self._graph = graph
        self._symbols = {symbol: fx.Proxy(node) for symbol, node in symbols.items()}
        self._written: dict[Any, Any] = {}

    def bound(self, leaf: Any) -> Any:
        if not is_symbolic(leaf):
            return leaf
        expression = private.expression_of(leaf)
        if expression not in self._written:
            with self._graph.inserting_before(self.before):
                value = private.evaluate(expression, self._symbols)
            self._written[expression] = value.node if isinstance(value, fx.Proxy) else value
        return self._written[expression]


def at_sizes(value: Any, numbers: Mapping[Any, int]) -> Any:
    """Return a symbolic number, or sizes or strides with some among them, for given values of the symbols."""
    if isinstance(value, (tuple, list)):
        return tuple(at_sizes(item, numbers) for item in value)
    return private.evaluate(private.expression_of(value), numbers) if is_symbolic(value) else value
