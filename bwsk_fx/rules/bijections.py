"""Functions that act on each element on its own and one to one, and their inverses.

Inverses run in float64 (complex128), so that what comes back is limited by the result's own precision alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bwsk_fx.rules.registry import Call, erases, preserves, unproven
from bwsk_fx.rules.sizes import short
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import OPERATOR, REFINED, Verdict

# Wider integers are probed at their extremes only.
_ENUMERABLE = {torch.bool: 1, torch.uint8: 8, torch.int8: 8, torch.int16: 16}
_STEPS = 128


@dataclass(frozen=True)
class Bijection:
    """A strictly monotone function of real numbers.

    Attributes:
        inverse: Its inverse, for float64 and complex128.
        domain: Where the inverse holds; None for everywhere.
        periodic: Whether it repeats over the complex numbers.
        integral: Whether it maps integers to integers of the same dtype one to one.
        limit: The absolute value that it tends to, where no dtype holds it exactly.
    """

    inverse: Callable[[Tensor], Tensor]
    domain: str | None = None
    periodic: bool = False
    integral: bool = False
    limit: float | None = None


def one_to_one(call: Call, name: str, function: Callable[[Tensor], Tensor], bijection: Bijection) -> Verdict:
    """Return the verdict of a call of `function`: S but for periods and for integers that share a result."""
    dtype = call.before.dtype
    if dtype.is_complex and bijection.periodic:
        return erases(f"{name} is periodic over the complex numbers")
    if not (dtype.is_floating_point or dtype.is_complex or bijection.integral):
        return on_integers(name, function, dtype)
    how = getattr(bijection.inverse, "__name__", "its inverse").strip("_").replace("_", " ")
    why = f"{name} is one-to-one and undone by {how}"
    undo = Undo(partial(_inverted, bijection.inverse, bijection.limit))
    return preserves(why, undo=undo, domain=bijection.domain)


def undo_by(inverse: Callable[[Tensor], Tensor]) -> Undo:
    """Return the undoing of a function of one operand by its inverse."""
    return Undo(partial(_inverted, inverse, None))


def _inverted(inverse: Callable[[Tensor], Tensor], limit: float | None, run: Run) -> Tensor:
    output = run.value
    operand = inverse(widened(output))
    if limit is None or output.is_complex():
        return operand
    reached = output.abs() >= torch.tensor(limit).to(output.dtype)
    return torch.where(reached, math.inf * output.sign().to(operand.dtype), operand)


def widened(value: Tensor) -> Tensor:
    """Return inexact numbers in the widest dtype of their kind, and integers as they are."""
    inexact = value.is_floating_point() or value.is_complex()
    return value.to(wide(value.dtype)) if inexact else value


def identity(value: Tensor) -> Tensor:
    """Return the value itself."""
    return value


def unchanged(why: str, domain: str | None = None) -> Verdict:
    """Return the verdict of a call that, with these attributes, returns its operand."""
    return preserves(why, confidence=REFINED, undo=undo_by(identity), domain=domain)


def on_integers(name: str, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Verdict:
    """Return the verdict of a function of integers, by trying all of them, or extreme ones where there are many."""
    values = _integers(dtype)
    if _has_twins(function, dtype):
        return erases(f"{name} gives several {short(dtype)} numbers one and the same result", confidence=REFINED)
    if dtype not in _ENUMERABLE:
        return unproven(f"whether {name} keeps all {short(dtype)} numbers apart is not known")
    why = f"{name} gives each of the {len(values)} {short(dtype)} numbers a result of its own"
    return preserves(why, confidence=REFINED, undo=Undo(partial(_looked_up, function)))


def _integers(dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.tensor([False, True])
    info = torch.iinfo(dtype)
    if dtype in _ENUMERABLE:
        return torch.arange(info.min, info.max + 1, dtype=torch.int64).to(dtype)
    extremes = {info.min, info.min + 1, info.max - 1, info.max, *range(max(info.min, -3), 4)}
    return torch.tensor(sorted(extremes), dtype=dtype)


@cache
def _has_twins(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    results = function(_integers(dtype))
    undefined = results.isnan()
    return int(undefined.sum()) > 1 or len(results[~undefined].unique()) < int((~undefined).sum())


def _looked_up(function: Callable[[Tensor], Tensor], run: Run) -> Tensor:
    values = _integers(run.before.dtype)
    results, order = _finite(function(values)).sort()
    wanted = _finite(run.output)
    right = torch.searchsorted(results, wanted.contiguous()).clamp(1, len(results) - 1)
    nearer = (wanted - results[right - 1]) <= (results[right] - wanted)
    return values[order[torch.where(nearer, right - 1, right)]]


def _finite(value: Tensor) -> Tensor:
    """Put infinities and NaN at both ends of the numbers, so that they are ordered and have differences."""
    return value.to(torch.float64).nan_to_num(nan=1.7e308, posinf=1.6e308, neginf=-1.6e308) / 2


def bisected(function: Callable[[Tensor], Tensor], low: float, high: float, increasing: bool, result: Tensor) -> Tensor:
    """Return x with `function(x) = result` for a strictly monotone function; infinite outside of (`low`, `high`)."""
    below, above = torch.full_like(result, low), torch.full_like(result, high)
    least, most = (function(end) for end in ((below, above) if increasing else (above, below)))
    under, over = result <= least, result >= most
    for _ in range(_STEPS):
        middle = (below + above) / 2
        is_right = (function(middle) < result) == increasing
        below, above = torch.where(is_right, middle, below), torch.where(is_right, above, middle)
    infinity = math.inf if increasing else -math.inf
    return ((below + above) / 2).masked_fill(under, -infinity).masked_fill(over, infinity)


def per_element(call: Call, amount: float) -> float | None:
    """Return an amount per element, times the elements per sample of the first dynamic operand."""
    total = call.elements()
    return None if total is None else total * amount


def one_bit_each(call: Call, why: str, confidence: float = OPERATOR) -> Verdict:
    """Return the verdict of a function that takes every value twice; K without an amount on complex numbers."""
    real = not call.before.dtype.is_complex
    return erases(why, bits=call.elements() if real else None, confidence=confidence)
