"""How an S verdict's operand is rebuilt: code that `certify` runs.

A rule that labels a call S hands over an `Undo`. Its `rebuild` sees the call's output and its witness, and nothing
else: every value that the verdict does not name stands on the meta device, where it has a shape and no elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from bwsk_fx.rules.arguments import Arguments

Value = TypeVar("Value")


@dataclass(frozen=True)
class Run(Arguments):
    """One executed call, as an inverse sees it.

    Attributes:
        target: The function, the method's name, or the module itself.
        module: The leaf module, else None.
        args: Positional arguments. Static values and witnesses are real; the other operands are on the meta device.
        kwargs: Keyword arguments, likewise.
        operands: The distinct dynamic operands, likewise, in the order of `Call.operands`.
        output: What the call returned.
        by_products: The by-products that the verdict's witness names.
        memory: What `once` has computed so far; shared by the runs of one call with the same static values.
    """

    target: Any
    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Tensor, ...]
    output: Any
    by_products: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def before(self) -> Tensor:
        """The first operand; on the meta device unless it is a witness."""
        return self.operands[0]

    @property
    def other(self) -> Any:
        """The argument of a binary operator that is not its first dynamic operand."""
        left, right = self.argument(0, "input"), self.argument(1, "other")
        return right if left is self.operands[0] else left

    def once(self, name: str, compute: Callable[[], Value]) -> Value:
        """Return what `compute` makes of static values alone, such as a weight's factors; computed once per call."""
        if name not in self.memory:
            self.memory[name] = compute()
        return self.memory[name]


@dataclass(frozen=True)
class Undo:
    """How operands are rebuilt from a call's output and the verdict's witness.

    It is made of module-level functions and `functools.partial`s of them, so that typed graphs can be copied.

    Attributes:
        rebuild: Returns the operand, or a sequence of them where `operands` names several.
        operands: Which of the dynamic operands it rebuilds, in order.
        by_products: Computes the by-products that the witness names, from a run with all values in place.
        condition: Returns the condition number of a linear map.
    """

    rebuild: Callable[[Run], Any]
    operands: tuple[int, ...] = (0,)
    by_products: Callable[[Run], Mapping[str, Tensor]] | None = None
    condition: Callable[[Run], float] | None = None


@dataclass(frozen=True)
class Factors:
    """A matrix A of full column rank as Q R in float64 (complex128), to solve A X = Y again and again.

    Attributes:
        q: Orthonormal columns, (..., rows, columns).
        r: Upper triangle, (..., columns, columns).
    """

    q: Tensor
    r: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Factors:
        """Factor a matrix (..., rows, columns) with at least as many rows as columns."""
        return cls(*torch.linalg.qr(matrix.detach().to(wide(matrix.dtype))))

    def solve(self, result: Tensor) -> Tensor:
        """Return X with A X = `result` (..., rows, n), in the dtype of `result`."""
        projected = self.q.mH @ result.to(self.q.dtype)
        # A column without rank is divided by next to nothing, so that the last bits of a result show in its elements.
        missing = (self.r.diagonal(dim1=-2, dim2=-1) == 0).to(self.r.dtype) * torch.finfo(self.r.dtype).tiny
        solution = torch.linalg.solve_triangular(self.r + torch.diag_embed(missing), projected, upper=True)
        return solution.to(torch.promote_types(result.dtype, torch.float32))

    def condition(self) -> float:
        """Return the 2-norm condition number, the worst where there are several matrices."""
        if self.r.numel() == 0:
            return 1.0
        values = torch.linalg.svdvals(self.r)
        return float((values[..., 0] / values[..., -1]).nan_to_num(nan=math.inf, posinf=math.inf).amax())


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the widest dtype of the same kind: float64 or complex128."""
    return torch.complex128 if dtype.is_complex else torch.float64


def unbroadcast(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the first of the copies that broadcasting made of a tensor of `shape`."""
    value = value[(0,) * (value.dim() - len(shape))] if value.dim() > len(shape) else value
    for dim, size in enumerate(shape):
        if size == 1 and value.shape[dim] != 1:
            value = value.narrow(dim, 0, 1)
    return value
