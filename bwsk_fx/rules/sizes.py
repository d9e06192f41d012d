"""Sizes of tensors per sample of a symbolic batch, and of their dtypes."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch


def is_batched(value: torch.Tensor) -> bool:
    """Whether a tensor grows with the batch."""
    return any(isinstance(size, torch.SymInt) for size in value.shape)


def elements(value: torch.Tensor) -> int | None:
    """Return the number of elements per sample: all of them where no size is symbolic.

    None where the number is not proportional to the batch.
    """
    product = 1
    symbolic: list[sympy.Expr] = []
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            symbolic.append(size.node.expr)
        else:
            product *= size
    # One plain symbol is the usual case and needs no algebra.
    if len(symbolic) == 1 and symbolic[0].is_Symbol:
        return product
    return _per_sample(sympy.Mul(product, *symbolic))


def erased(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """Return how many elements per sample `after` has less than `before`; None where that cannot be told."""
    kept = 0 if is_batched(before) and not is_batched(after) else elements(after)
    given = elements(before)
    return None if given is None or kept is None else given - kept


def as_int(size: Any) -> int | None:
    """Return a size as a number, or None where it is symbolic."""
    return size if isinstance(size, int) else None


def _per_sample(total: sympy.Expr) -> int | None:
    symbols = total.free_symbols
    if not symbols:
        return int(total)
    if len(symbols) > 1:
        return None
    (batch,) = symbols
    share = sympy.simplify(total / batch)
    return int(share) if share.is_Integer else None


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every finite value of one dtype is a value of the other."""
    if before is after or before is torch.bool:
        return True
    if after is torch.bool or (before.is_complex and not after.is_complex):
        return False
    if before.is_complex or after.is_complex:
        return widens(before.to_real() if before.is_complex else before, after.to_real())
    if before.is_floating_point:
        return after.is_floating_point and _float_widens(torch.finfo(before), torch.finfo(after))
    return _integer_widens(torch.iinfo(before), after)


def _float_widens(small: torch.finfo, large: torch.finfo) -> bool:
    return large.eps <= small.eps and large.max >= small.max and large.tiny <= small.tiny


def _integer_widens(small: torch.iinfo, after: torch.dtype) -> bool:
    if after.is_floating_point:
        # A float holds every integer up to one over its spacing at one, doubled.
        exact, largest = 2 / torch.finfo(after).eps, torch.finfo(after).max
        return small.max <= min(exact, largest)
    return torch.iinfo(after).min <= small.min and small.max <= torch.iinfo(after).max


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def narrowed_bits(operand: torch.Tensor, after: torch.dtype) -> float | None:
    """Return the mantissa bits per sample that a floating-point tensor loses when it is rounded to `after`."""
    bits = math.log2(torch.finfo(after).eps / torch.finfo(operand.dtype).eps)
    total = elements(operand)
    return None if total is None else total * max(bits, 0)
