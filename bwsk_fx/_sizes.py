"""Symbolic sizes of a recorded run: the nodes that compute them, and the conditions on them."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx.errors import CaptureError

_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul}


class Sizes:
    """Sizes in a graph that depend on the batch.

    Args:
        graph: Takes the nodes.

    Attributes:
        symbols: Batch symbol to (placeholder name, dimension).
        conditions: What the symbols have to fulfil for the graph to hold.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.symbols: dict[sympy.Symbol, tuple[str, int]] = {}
        self.conditions: list[sympy.Basic] = []
        self._graph = graph
        self._given: dict[sympy.Symbol, torch.SymInt] = {}
        self._nodes: dict[sympy.Expr, fx.Node] = {}

    def add_placeholder(self, name: str, fake: torch.Tensor) -> None:
        """Learn the symbols among the sizes of an input."""
        for dim, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                self.symbols.setdefault(size.node.expr, (name, dim))
                self._given.setdefault(size.node.expr, size)

    def note_branch(self, expr: sympy.Basic, result: bool | int) -> None:
        """Make what Python code took for a plain value a condition of the graph."""
        if expr.free_symbols:
            self._require((expr if result else sympy.Not(expr)) if isinstance(result, bool) else sympy.Eq(expr, result))

    def note_squeeze(self, operand: Any, *dims: Any, **named: Any) -> None:
        """Note whether sizes were one, on which it depends how many dimensions the result has."""
        picked = pytree.tree_leaves((dims, [value for name, value in named.items() if name == "dim"]))
        for dim in picked or range(operand.dim()):
            size = operand.shape[dim] if isinstance(dim, int) and -operand.dim() <= dim < operand.dim() else None
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols <= {*self.symbols}:
                expr = size.node.expr
                self._require(sympy.Eq(expr, 1) if size == 1 else sympy.Ne(expr, 1))

    def _require(self, condition: sympy.Basic) -> None:
        if condition not in self.conditions:
            self.conditions.append(condition)

    def finish(self) -> None:
        """Erase the nodes that nobody reads, and make sizes that operators have fixed conditions of the graph."""
        for node in reversed(list(self._nodes.values())):
            if not node.users:
                self._graph.erase_node(node)
        # Such as take_along_dim: whatever reads the size has that number.
        for symbol, size in self._given.items():
            if size.node.expr.is_Integer:
                self.conditions.append(sympy.Eq(symbol, size.node.expr))

    def argument(self, expr: sympy.Expr, value: torch.SymInt | int) -> Any:
        """Return a node (or a plain number) that computes `expr` from the placeholders' sizes."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self._nodes:
            node = self._size_node(expr)
            node.meta["val"] = value
            self._nodes[expr] = node
        return self._nodes[expr]

    def _size_node(self, expr: sympy.Expr) -> fx.Node:
        if expr in self.symbols:
            name, dim = self.symbols[expr]
            source = next(node for node in self._graph.find_nodes(op="placeholder") if node.target == name)
            return self._graph.call_method("size", (source, dim))
        parts = [self.argument(part, self.symbolic(part)) for part in expr.args]
        if expr.func in _ARITHMETIC:
            node = parts[0]
            for part in parts[1:]:
                node = self._graph.call_function(_ARITHMETIC[expr.func], (node, part))
                node.meta["val"] = self.symbolic(expr)
            return node
        if expr.func.__name__ == "FloorDiv":
            return self._graph.call_function(operator.floordiv, tuple(parts))
        raise CaptureError(f"a size is computed from the batch size in a way that cannot be recorded: {expr}")

    def symbolic(self, expr: sympy.Expr) -> Any:
        """Return a size that stands for `expr`, a plain number where that is one."""
        if expr.is_Integer:
            return int(expr)
        name, _ = next(iter(self.symbols.values()))
        node = next(node for node in self._graph.find_nodes(op="placeholder") if node.target == name)
        return node.meta["val"].fake_mode.shape_env.create_symintnode(expr, hint=None)
