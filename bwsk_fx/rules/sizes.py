"""Sizes of fake tensors per sample of a symbolic batch."""

from __future__ import annotations

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
