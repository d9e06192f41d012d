"""Operands that inverses tend to fail on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# GELU has its minimum here: its two branches meet, and an inverse that takes one of them fails nearby.
GELU_MINIMUM = -0.7517916243


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _large(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 100 * _normal(shape, generator)


def _tiny(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 1e-3 * _normal(shape, generator)


def _repeated(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator).round()


def _near_the_minimum(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return GELU_MINIMUM + 0.05 * _normal(shape, generator)


ADVERSARIAL: Mapping[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "normal": _normal,
    "large": _large,
    "tiny": _tiny,
    "repeated": _repeated,
    "near GELU's minimum": _near_the_minimum,
}


def adversarial(operand: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Return values of one of the kinds in `ADVERSARIAL` with the operand's shape and dtype.

    Integers, booleans and other operands that are no floating-point numbers come back as they are: they may be indices.
    """
    if not (operand.is_floating_point() or operand.is_complex()):
        return operand
    generator = torch.Generator().manual_seed(seed)
    values = ADVERSARIAL[kind](operand.shape, generator)
    if operand.is_complex():
        values = torch.complex(values, ADVERSARIAL[kind](operand.shape, generator))
    return values.to(operand.device, operand.dtype)


def random_values(value: Any, symbol: int = 2) -> Any:
    """Return normally distributed values with the shape and dtype of a fake tensor; zeros for integers.

    Args:
        value: A fake tensor, a symbolic size, or anything else, which comes back as it is.
        symbol: The number that stands for the batch size and all other symbols.
    """
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, symbol)))
    if not isinstance(value, Tensor):
        return value
    shape = torch.Size(random_values(size, symbol) for size in value.shape)
    return adversarial(torch.zeros(shape, dtype=value.dtype), "normal")
