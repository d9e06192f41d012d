"""Inverses of arithmetic, element by element.

Left out on purpose, since what comes back can be far off on ordinary data:

- a product with a tensor, static ones included: weights may become zero while they train;
- `exp`, `expm1`, `tanh`, `sigmoid` and `erf`, whose results underflow or round to a limit: the logarithm of a zero is
  infinite, and becomes NaN where a gradient of zero meets it;
- `log`, `log2`, `log10` and `log1p`: the exponential turns a relative error of y into one that is |y| times as large;
- `abs`, `square` and other powers, which fold the axis;
- a softmax from its input and the logsumexp of its rows: x - logsumexp cancels (measured: 1.5 times softmax's own error
  for logits around 0, 34 times around 100), and the input alone gives it exactly, at the same cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, calls, inverts
from bwsk_fx.rules.inverse_normalization import rms_norm_inverse
from bwsk_fx.rules.sizes import widens

aten = torch.ops.aten


@inverts(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def sum_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Either operand of y = a ± α b from the result and the other one: a = y ∓ α b, b = ± (y - a) / α."""
    left, right = node.args[:2]
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    plus = node.target in (aten.add.Tensor, aten.add.Scalar)
    if not _same_values(node, left) or not _scales(alpha, node):
        return
    scale = {} if alpha == 1 else {"alpha": alpha}
    undo = aten.sub.Tensor if plus else aten.add.Tensor
    if not isinstance(right, fx.Node):
        yield Inverse(left, (node,), calls(undo, right, **scale), False, rule="sum")  # type: ignore[arg-type]
        return
    yield Inverse(left, (node, right), calls(undo, **scale), False, rule="sum")  # type: ignore[arg-type]
    if _same_values(node, right):
        tails = (node, left) if plus else (left, node)
        undo_right = _difference_over(alpha)
        yield Inverse(right, tails, undo_right, False, rule="sum", magnifies=_shrinks(alpha))  # type: ignore[arg-type]


@inverts(aten.rsub.Scalar, aten.rsub.Tensor)
def reversed_difference_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Either operand of y = b - a: a = b - y, b = y + a."""
    left, right, *alpha = node.args
    if alpha not in ([], [1]) or node.kwargs or not _same_values(node, left):
        return
    if isinstance(right, fx.Node):
        yield Inverse(left, (right, node), calls(aten.sub.Tensor), False, rule="sum")  # type: ignore[arg-type]
        if _same_values(node, right):
            yield Inverse(right, (node, left), calls(aten.add.Tensor), False, rule="sum")  # type: ignore[arg-type]
    else:
        yield Inverse(left, (node,), calls(aten.rsub.Scalar, right), False, rule="sum")  # type: ignore[arg-type]


@inverts(aten.addcmul.default)
def product_sum_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The summand of y = a + v b c from the result and both factors: a = y - v b c."""
    summand, first, second = node.args
    value = node.kwargs.get("value", 1)
    if _same_values(node, summand):
        undo = calls(aten.addcmul.default, value=-value)  # type: ignore[operator]
        yield Inverse(summand, (node, first, second), undo, False, rule="sum")  # type: ignore[arg-type]


@inverts(aten.mul.Tensor, aten.mul.Scalar)
def product_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """A product with a number that is not zero is undone by the quotient; with a tensor, RMSNorm's rstd alone is."""
    operand, factor = node.args
    if isinstance(factor, fx.Node):
        yield from rms_norm_inverse(node, witnesses)
    elif _same_values(node, operand) and _scales(factor, node):
        yield _rescaled(operand, (node,), calls(aten.div.Tensor, factor), _shrinks(factor))  # type: ignore[arg-type]


@inverts(aten.div.Tensor, aten.div.Scalar)
def quotient_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The dividend is the quotient times the divisor, as long as that is neither zero nor infinite."""
    operand, divisor = node.args
    if not _same_values(node, operand):
        return
    if isinstance(divisor, fx.Node):
        if divisor.meta["val"].dtype == node.meta["val"].dtype:
            yield _rescaled(operand, (node, divisor), calls(aten.mul.Tensor), True)  # type: ignore[arg-type]
    elif _scales(divisor, node):
        yield _rescaled(operand, (node,), calls(aten.mul.Tensor, divisor), not _shrinks(divisor))  # type: ignore[arg-type]


@inverts(aten._to_copy.default)
def cast_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A cast that loses no bit is undone by the cast back."""
    operand, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    same_place = operand.device == result.device and operand.stride() == result.stride()
    if widens(operand.dtype, result.dtype) and same_place:
        back = calls(aten._to_copy.default, dtype=operand.dtype)
        yield Inverse(node.args[0], (node,), back, True, rule="widening cast")  # type: ignore[arg-type]


@inverts(aten.neg.default)
def negation_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Negating again gives the very bits."""
    if node.args[0].meta["val"].stride() == node.meta["val"].stride():  # type: ignore[union-attr]
        yield Inverse(node.args[0], (node,), calls(aten.neg.default), True, rule="negation")  # type: ignore[arg-type]


@inverts(aten.sqrt.default)
def root_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The square of a root, for x ≥ 0: within two units in the last place, in every dtype."""
    yield from _powered(node, 2, "square of the root")


@inverts(aten.reciprocal.default)
def reciprocal_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The reciprocal of a reciprocal, for |x| within the dtype's normal range; in float16 that ends at 16384."""
    if node.meta["val"].dtype is not torch.float16:
        yield from _powered(node, -1, "reciprocal")


@inverts(aten.rsqrt.default)
def reciprocal_root_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """One over the square, for x > 0; the square would be subnormal in float16."""
    if node.meta["val"].dtype is not torch.float16:
        yield from _powered(node, -2, "one over the square")


def _powered(node: fx.Node, exponent: int, rule: str) -> Iterator[Inverse]:
    if _same_values(node, node.args[0]):
        back = calls(aten.pow.Tensor_Scalar, exponent)
        yield Inverse(node.args[0], (node,), back, False, rule=rule, magnifies=True)  # type: ignore[arg-type]


def _rescaled(operand: fx.Node, tails: tuple[fx.Node, ...], emit: Emit, magnifies: bool) -> Inverse:
    return Inverse(operand, tails, emit, False, rule="scaling", magnifies=magnifies)


def _same_values(node: fx.Node, operand: object) -> bool:
    """Whether `operand` has the shape and dtype of the result, so that undoing restores it."""
    if not isinstance(operand, fx.Node):
        return False
    result, value = node.meta["val"], operand.meta["val"]
    return value.shape == result.shape and value.dtype == result.dtype and value.dtype.is_floating_point


def _scales(factor: Any, node: fx.Node) -> bool:
    """Whether a product with, or a quotient by, a number neither flushes ordinary values to zero nor overflows."""
    tiny = torch.finfo(node.meta["val"].dtype).tiny
    return isinstance(factor, (int, float)) and tiny <= abs(factor) <= 1 / tiny


def _shrinks(factor: Any) -> bool:
    return abs(factor) < 1


def _difference_over(alpha: Any) -> Emit:
    """Return an `Emit` for the difference of two tails, over `alpha`."""
    if alpha == 1:
        return calls(aten.sub.Tensor)

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(aten.div.Tensor, (graph.call_function(aten.sub.Tensor, tuple(tails)), alpha))

    return emit
