"""Linear maps that act on each spatial dimension on its own: averages over windows, and interpolation.

The whole map is the Kronecker product of one matrix per dimension, so its rank is the product of their ranks: a
dimension that shrinks erases, and where none does the matrices decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bwsk_fx.rules.registry import Call, erases, preserves, unproven
from bwsk_fx.rules.sizes import as_int
from bwsk_fx.rules.undo import Factors, Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

# Longer dimensions are not factored while typing, which has to be quick.
_LARGEST = 64

# What one dimension does: its number, its size before and after -> matrix (after, before), in float64.
Response = Callable[[int, int, int], Tensor]


def separable(call: Call, spatial: int, response: Response, sure: bool = False) -> Verdict:
    """Return the verdict of a separable linear map over the last `spatial` dimensions.

    Args:
        call: The call; its first dynamic operand is what is mapped.
        spatial: Number of dimensions.
        response: The matrix of each dimension; a module-level function or a partial of one.
        sure: Whether the matrices are known to have full column rank where no dimension shrinks.
    """
    before, after = spatial_sizes(call, spatial)
    if before is None or after is None:
        return unproven("its spatial sizes are not numbers")
    given, kept = math.prod(before), math.prod(map(min, before, after))
    if kept < given:
        total = call.elements()
        lost = None if total is None else total // given * (given - kept)
        return erases(f"of {given} positions {kept} degrees of freedom remain", lost, confidence=REFINED)
    if not sure and max(before) > _LARGEST:
        return unproven(
            f"no dimension shrinks, and its matrices are too large (over {_LARGEST}) to factor while typing"
        )
    if not sure and not all(map(_is_full, map(response, range(spatial), before, after))):
        return erases("no dimension shrinks, but the weights of neighbouring outputs are dependent", confidence=REFINED)
    undo = Undo(partial(_solve, spatial, response), condition=partial(_condition, spatial, response))
    return preserves("no dimension shrinks, and solving for each of them undoes it", confidence=REFINED, undo=undo)


def spatial_sizes(call: Call, spatial: int) -> tuple[list[int] | None, list[int] | None]:
    """Return the last `spatial` sizes of the operand and of the result; None where they are symbolic."""
    return _numbers(call.before.shape[-spatial:]), _numbers(call.value.shape[-spatial:])


def _numbers(shape: Sequence[int]) -> list[int] | None:
    sizes = [as_int(size) for size in shape]
    return None if None in sizes else [size for size in sizes if size is not None]


def _is_full(matrix: Tensor) -> bool:
    if matrix.numel() == 0:
        return matrix.shape[1] == 0
    diagonal = torch.linalg.qr(matrix, mode="r").R.diagonal().abs()
    return bool(diagonal.min() > 1e-9 * diagonal.max())


def _factors(spatial: int, response: Response, run: Run) -> list[Factors]:
    result = run.value
    sizes = zip(range(spatial), run.before.shape[-spatial:], result.shape[-spatial:], strict=True)
    return run.once("factors", lambda: [Factors.of(response(*dimension)) for dimension in sizes])


def _solve(spatial: int, response: Response, run: Run) -> Tensor:
    value = run.value
    for dim, factors in zip(range(-spatial, 0), _factors(spatial, response, run), strict=True):
        value = factors.solve(value.movedim(dim, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, dim)
    return value


def _condition(spatial: int, response: Response, run: Run) -> float:
    return math.prod(factors.condition() for factors in _factors(spatial, response, run))
