"""Arithmetic element by element, comparisons and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from bwsk_fx.rules.activation import narrowing
from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule, broadcast, mapped
from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, calls, inverts
from bwsk_fx.rules.registry import Call, erases, labels, other_operand, preserves
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten


def _pair(call: Call) -> tuple[Any, Any]:
    """The two arguments of a binary operator."""
    return call.argument(0, "input"), call.argument(1, "other")


def _other(call: Call) -> Any:
    """The argument of a binary operator that is not its first dynamic operand."""
    left, right = _pair(call)
    return right if left is call.operands[0] else left


@labels(operator.add, ops="add", methods="__radd__ __add__")
def add(call: Call) -> Verdict:
    """A sum: the result less the other operand."""
    return _sum(call, cancels=False)


@labels(operator.sub, torch.rsub, ops="sub", methods="__sub__ __rsub__")
def sub(call: Call) -> Verdict:
    """A difference: the result plus the other operand."""
    return _sum(call, cancels=True)


def _sum(call: Call, cancels: bool) -> Verdict:
    left, right = _pair(call)
    if left is right:
        if cancels:
            return erases("a value less itself is zero", call.elements(), confidence=REFINED)
        return preserves("a value plus itself is halved", confidence=REFINED)
    if len(call.operands) == 2:
        witness = other_operand(call.operands[1])
        return preserves(f"{call.operands[0].name} is rebuilt from the result and {witness.names[0]}", witness)
    return preserves("the other operand is static, so taking it off again rebuilds the operand where it is finite")


@labels(operator.mul, ops="mul", methods="__mul__ __rmul__")
def mul(call: Call) -> Verdict:
    """A product: the result over the other operand, where that is not zero."""
    other = _other(call)
    if other is call.operands[0]:
        return square(call)
    if _is_number(other):
        return _scaled(call, other)
    if _is_mask(other) or _is_mask(call.operands[0]):
        return erases("a mask of zeros and ones erases what it zeroes")
    return _factor(call, other)


@labels(operator.truediv, ops="div true_divide", methods="__truediv__ __rtruediv__ __rdiv__")
def div(call: Call) -> Verdict:
    """A quotient: the result times the divisor, or the dividend over the result."""
    if call.node.kwargs.get("rounding_mode") is not None:
        return erases("rounding erases the fraction")
    other = _other(call)
    if other is call.operands[0]:
        return erases("a value over itself is one", call.elements(), confidence=REFINED)
    return _scaled(call, other) if _is_number(other) else _factor(call, other)


def _scaled(call: Call, factor: Any) -> Verdict:
    if factor == 0:
        return erases("the factor is zero", call.elements(), confidence=REFINED)
    return preserves(f"the factor {factor} is not zero, so dividing by it undoes it", confidence=REFINED)


def _factor(call: Call, other: Any) -> Verdict:
    if call.is_dynamic(other):
        return preserves(f"{other.name} undoes it where it is not zero, which certify checks", other_operand(other))
    return preserves("the static factor undoes it where it is not zero, which certify checks")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_mask(operand: Any) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else operand
    return isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool)


@labels(operator.neg, ops="neg negative exp expm1 exp2 log log1p log2 log10 sqrt rsqrt reciprocal logit sinh asinh")
def strictly_monotone(call: Call) -> Verdict:
    """Strictly monotone on its domain, with an inverse of its own."""
    if not call.before.is_floating_point():
        return preserves("it is one-to-one on integers")
    return preserves("it is strictly monotone on its domain and has a closed inverse, short of overflow")


@labels(ops="square abs absolute cosh")
def square(call: Call) -> Verdict:
    """Even functions: the sign goes."""
    return erases("both signs give one result: one bit per element", bits=call.elements())


@labels(operator.pow, torch.Tensor.__pow__, torch.Tensor.__ipow__, ops="pow")
def power(call: Call) -> Verdict:
    """A power with a constant exponent; odd ones keep the sign."""
    exponent = call.argument(1, "exponent")
    if not _is_number(exponent) or call.argument(0, "input") is not call.operands[0]:
        return erases("no inverse is known for an exponent that is not a number")
    if exponent == 0:
        return erases("everything to the power of zero is one", call.elements(), confidence=REFINED)
    if exponent % 2 == 0:
        return square(call)
    return preserves(
        f"the power {exponent} is strictly monotone on its domain, so its root undoes it", confidence=REFINED
    )


@labels(operator.mod, operator.floordiv, operator.abs, torch.remainder, torch.fmod, torch.floor_divide)
@labels(ops="sin cos tan sign sgn floor ceil round trunc frac clamp clamp_min clamp_max clip maximum minimum")
@labels(methods="remainder fmod floor_divide __floordiv__ __rfloordiv__ __mod__ __rmod__")
def many_to_one(_: Call) -> Verdict:
    """Periodic, constant over intervals, or a choice; how much goes depends on the data."""
    return erases("many inputs give one output")


@labels(operator.gt, operator.lt, operator.ge, operator.le, operator.eq, operator.ne)
@labels(operator.and_, operator.or_, ops="gt lt ge le eq ne isnan isinf isfinite logical_and logical_or any all")
@labels(ops="bitwise_and bitwise_or", methods="__gt__ __lt__ __ge__ __le__ __eq__ __ne__ __and__ __or__")
def to_bits(_: Call) -> Verdict:
    """Comparisons leave one bit of each operand."""
    return erases("all that is left is one bit")


@labels(operator.invert, ops="logical_not bitwise_not", methods="__invert__")
def complement(call: Call) -> Verdict:
    """Its own inverse on masks and integers."""
    if call.node.target in (torch.logical_not, "logical_not") and call.before.dtype is not torch.bool:
        return erases("all that is left is one bit")
    return preserves("doing it twice changes nothing")


@labels(ops="where masked_fill")
def choice(call: Call) -> Verdict:
    """Takes one of two values; the other is gone."""
    return erases("where the mask decides against an element, it is gone")


@labels(methods="to type float double half bfloat16 int long bool short type_as cpu cuda")
def cast(call: Call) -> Verdict:
    """A cast: S when it widens, K by its mantissa tail when it narrows."""
    before, after = call.before.dtype, call.value.dtype
    if widens(before, after):
        how = "keeps the dtype" if before is after else "widens"
        return preserves(f"{_short(before)} → {_short(after)} {how}, so the cast back undoes it", confidence=REFINED)
    why = f"{_short(before)} → {_short(after)} narrows"
    if before.is_floating_point and after.is_floating_point:
        return erases(
            f"{why} and erases the mantissa's tail", bits=narrowing(call, call.elements()), confidence=REFINED
        )
    return erases(why, confidence=REFINED)


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@axis_rule(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow)
@axis_rule(operator.gt, operator.lt, operator.ge, operator.le, operator.eq, operator.ne, operator.and_, operator.or_)
@axis_rule(ops="add sub rsub mul div true_divide pow remainder fmod floor_divide maximum minimum where masked_fill")
@axis_rule(ops="clamp clamp_min clamp_max clip")
@axis_rule(ops="gt lt ge le eq ne logical_and logical_or bitwise_and bitwise_or")
@axis_rule(methods="__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __mod__")
@axis_rule(methods="__floordiv__ __rfloordiv__ __gt__ __lt__ __ge__ __le__ __eq__ __ne__ __and__ __or__")
def elementwise_axes(call: AxisCall) -> Effect:
    """Maps every axis, as long as the operands are sharded alike."""
    aligns = " once its operands are sharded alike" if len(call.inputs) > 1 else ""
    return broadcast(call, f"it acts on each element on its own{aligns}")


@axis_rule(operator.neg, operator.abs, operator.invert, methods="__invert__")
@axis_rule(ops="neg negative exp expm1 exp2 log log1p log2 log10 sqrt rsqrt reciprocal logit sinh asinh square abs")
@axis_rule(ops="absolute cosh sin cos tan sign sgn floor ceil round trunc frac isnan isinf isfinite logical_not")
@axis_rule(ops="bitwise_not")
@axis_rule(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
@axis_rule(methods="to type float double half bfloat16 int long bool short type_as cpu cuda")
def unary_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    return mapped(call.operand.layout, "it acts on each element on its own")


@inverts(aten.add.Tensor, aten.sub.Tensor)
def residual_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Either operand of a sum is the result less the other; the other operand is the witness."""
    left, right = node.args
    if node.kwargs or not _same_values(node, left):
        return
    undo, redo = (aten.sub.Tensor, aten.add.Tensor)
    if node.target is aten.sub.Tensor:
        undo, redo = redo, undo
    yield Inverse(left, (node, right) if isinstance(right, fx.Node) else (node,), _undo(undo, right), False, rule="sum")  # type: ignore[arg-type]
    if _same_values(node, right):
        tails = (node, left) if node.target is aten.add.Tensor else (left, node)
        yield Inverse(right, tails, calls(aten.sub.Tensor), False, rule="sum")  # type: ignore[arg-type]


@inverts(aten.mul.Tensor, aten.div.Tensor)
def scaling_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A product with a non-zero number is undone by the quotient, and the other way round."""
    operand, factor = node.args
    if isinstance(factor, (int, float)) and factor and _same_values(node, operand):
        undo = aten.div.Tensor if node.target is aten.mul.Tensor else aten.mul.Tensor
        yield Inverse(operand, (node,), calls(undo, factor), False, rule="scaling")  # type: ignore[arg-type]


@inverts(aten._to_copy.default)
def cast_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A cast that loses no bit is undone by the cast back."""
    operand, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if widens(operand.dtype, result.dtype) and operand.device == result.device:
        back = calls(aten._to_copy.default, dtype=operand.dtype)
        yield Inverse(node.args[0], (node,), back, True, rule="widening cast")  # type: ignore[arg-type]


def _same_values(node: fx.Node, operand: object) -> bool:
    """Whether `operand` has the shape and dtype of the result, so that subtracting restores it."""
    if not isinstance(operand, fx.Node):
        return False
    result, value = node.meta["val"], operand.meta["val"]
    return value.shape == result.shape and value.dtype == result.dtype and value.dtype.is_floating_point


def _undo(target: Callable, other: object) -> Emit:
    return calls(target) if isinstance(other, fx.Node) else calls(target, other)
