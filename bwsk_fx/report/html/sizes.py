"""Symbolic sizes for people: the batch as a letter, bytes for a batch that is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, Tensor, fx
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private


@dataclass(frozen=True)
class Sizes:
    """The batch symbols of a graph.

    Attributes:
        batch: The batch that bytes are for; None where they are for one sample.
        letters: The letter of each symbol.
        values: The number of each symbol.
    """

    batch: int | None
    letters: Mapping[Any, str] = field(default_factory=dict)
    values: Mapping[Any, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: Mapping[str, Any] | None) -> Sizes:
        """Read the symbols off the first dimensions of a graph's inputs, and their numbers off `inputs`."""
        values: dict[Any, int] = {}
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], SymInt):
                given = (inputs or {}).get(str(node.target))
                size = given.shape[0] if isinstance(given, Tensor) else 1
                values.setdefault(private.expression_of(value.shape[0]), size)
        letters = {symbol: "B" if len(values) == 1 else f"B{place}" for place, symbol in enumerate(values, 1)}
        return cls(max(values.values(), default=1) if inputs is not None else None, letters, values)

    def results(self, value: Any) -> Iterator[dict[str, Any]]:
        """Describe each tensor among a node's results: shape, dtype, bytes."""
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                shape = [self._text(size) for size in tensor.shape]
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield {"shape": shape, "dtype": dtype, "bytes": self.bytes(tensor)}

    def bytes(self, tensor: Tensor) -> int:
        """Return what a tensor takes for the batch."""
        return math.prod(map(self._number, tensor.shape)) * tensor.element_size()

    def _text(self, size: int | SymInt) -> str:
        if not isinstance(size, SymInt):
            return str(size)
        return str(private.expression_of(size).subs({symbol: _symbol(name) for symbol, name in self.letters.items()}))

    def _number(self, size: int | SymInt) -> int:
        if not isinstance(size, SymInt):
            return int(size)
        expression = private.expression_of(size)
        return int(expression.subs(dict.fromkeys(expression.free_symbols, 1) | dict(self.values)))


def _symbol(name: str) -> Any:
    from sympy import Symbol

    return Symbol(name)
