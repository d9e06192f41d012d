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

# Beyond this many columns, singular values take longer than all else; this many iterations estimate the outer two.
_LARGE, _ITERATIONS = 512, 30

# Values of unknowns that a matrix leaves open: how much larger than those that are determined, how often the phase
# turns with the bits of a result (over a hundred radians for the last bit in float64), and what keeps them finite where
# the matrix is zero.
_FAR, _TURNS, _SMALLEST_PIVOT = 1e4, 2.0**60, 1e-300


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
    def value(self) -> Tensor:
        """The result; the first one where there are several."""
        return self.output if isinstance(self.output, Tensor) else self.output[0]

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
        free: Columns without rank: what they are multiplied with leaves no trace in a result, (..., columns).
    """

    q: Tensor
    r: Tensor
    free: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Factors:
        """Factor a matrix (..., rows, columns) with at least as many rows as columns."""
        q, r = torch.linalg.qr(matrix.detach().to(wide(matrix.dtype)))
        pivots = r.diagonal(dim1=-2, dim2=-1).abs()
        negligible = torch.finfo(r.dtype).eps * q.shape[-2] * pivots.norm(dim=-1, keepdim=True)
        return cls(q, r, pivots <= negligible)

    def solve(self, result: Tensor) -> Tensor:
        """Return X with A X = `result` (..., rows, n), in the dtype of `result`.

        Unknowns that A does not determine get arbitrary values of about the right size, other ones for each last bit of
        the result. Whoever moves the result by its last bits can tell them from those that are determined.
        """
        solution = torch.linalg.solve_triangular(*self._system(result.to(self.q.dtype)), upper=True)
        return solution.to(torch.promote_types(result.dtype, torch.float32))

    def _system(self, result: Tensor) -> tuple[Tensor, Tensor]:
        """Return the triangle and its right side, with an equation of its own for each free unknown."""
        projected = self.q.mH @ result
        if not self.free.any():
            return self.r, projected
        free = self.free[..., None]
        size = self.r.diagonal(dim1=-2, dim2=-1).abs().norm(dim=-1)[..., None, None].clamp(min=_SMALLEST_PIVOT)
        arbitrary = _FAR * _scrambled(result) / size
        unit = torch.eye(self.r.shape[-1], dtype=self.r.dtype, device=self.r.device)
        return torch.where(free, unit, self.r), torch.where(free, arbitrary.to(projected.dtype), projected)

    def condition(self) -> float:
        """Return the 2-norm condition number, the worst where there are several matrices.

        With more than 512 columns it is estimated from below, by iterations from a random start.
        """
        if self.r.numel() == 0:
            return 1.0
        if self.r.shape[-1] > _LARGE:
            ratio = _estimated_condition(self.r)
        else:
            values = torch.linalg.svdvals(self.r)
            ratio = values[..., 0] / values[..., -1]
        return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).amax())


def _scrambled(result: Tensor) -> Tensor:
    """Return a number per column of (..., rows, n), at most its largest element, that depends on all last bits."""
    magnitude = result.abs()
    mantissa, _ = torch.frexp(magnitude)
    return magnitude.amax(-2, keepdim=True) * torch.sin(mantissa * _TURNS).mean(-2, keepdim=True)


def _estimated_condition(triangle: Tensor) -> Tensor:
    """Return lower bounds of condition numbers: power iterations with R and with its inverse."""
    start = torch.randn(triangle.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = smallest = start.to(triangle).expand(*triangle.shape[:-1], 1)
    for _ in range(_ITERATIONS):
        stretched = triangle.mH @ (triangle @ largest)
        shrunk = torch.linalg.solve_triangular(triangle.mH, smallest, upper=False)
        shrunk = torch.linalg.solve_triangular(triangle, shrunk, upper=True)
        stretch, shrink = stretched.norm(dim=-2, keepdim=True), shrunk.norm(dim=-2, keepdim=True)
        largest, smallest = stretched / stretch, shrunk / shrink
    return (stretch * shrink).sqrt()


def as_it_is(run: Run) -> Tensor:
    """Rebuild an operand that comes out as it went in."""
    return run.value


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
