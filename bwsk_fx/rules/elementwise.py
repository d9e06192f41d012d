"""Sums, products and quotients, and the axis behaviour of everything that acts element by element."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule, broadcast, mapped
from bwsk_fx.rules.bijections import per_element, unchanged, widened
from bwsk_fx.rules.broadcasting import broadcasts, from_result, where_kept
from bwsk_fx.rules.integers import odd_inverse, trailing_zeros
from bwsk_fx.rules.random import zero_rate
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven, witness_of
from bwsk_fx.rules.sizes import elements, short, widens
from bwsk_fx.rules.spelling import plain_name
from bwsk_fx.rules.undo import Run, as_it_is
from bwsk_fx.verdict import OPERATOR, REFINED, Verdict


def pair(call: Call | Run) -> tuple[Any, Any]:
    """Return the two arguments of a binary operator."""
    return call.argument(0, "input"), call.argument(1, "other")


def _other(call: Call) -> Any:
    """The argument of a binary operator that is not its first dynamic operand."""
    left, right = pair(call)
    return right if left is call.operands[0] else left


@labels(operator.add, operator.iadd, ops="add", methods="__radd__ __add__ __iadd__")
@broadcasts
def add(call: Call) -> Verdict:
    """A sum: the result less the other operand."""
    return _sum(call, 1, call.argument(2, "alpha", 1))


@labels(operator.sub, operator.isub, torch.subtract, ops="sub", methods="__sub__ __isub__ subtract")
@broadcasts
def sub(call: Call) -> Verdict:
    """A difference: the result plus the other operand."""
    return _sum(call, 1, -call.argument(2, "alpha", 1))


@labels(torch.rsub, methods="__rsub__", atens="rsub")
@broadcasts
def rsub(call: Call) -> Verdict:
    """A difference the other way round: the other operand less the result."""
    return _sum(call, -call.argument(2, "alpha", 1), 1)


def _sum(call: Call, left_weight: float, right_weight: float) -> Verdict:
    """A weighted sum: the result less the other summand, over the operand's own weight."""
    left, right = pair(call)
    if call.value.dtype is torch.bool:
        return erases("a sum of truth values is their union")
    if _rounds(call):
        return _rounded(call)
    if left is right:
        return _scaled(call, left_weight + right_weight, partial(_over, left_weight + right_weight))
    own, weight = (left_weight, right_weight) if left is call.operands[0] else (right_weight, left_weight)
    return _less_the_other(call, own, weight)


def _less_the_other(call: Call, own: float, weight: float) -> Verdict:
    estimate = partial(_less_other, own, weight)
    verdict, other = _scaled(call, own, estimate), _other(call)
    if verdict.undo is None:
        return verdict
    domain = "the other summand does not absorb it"
    witness = witness_of(call, other)
    if witness.names:
        why = f"{call.operands[0].name} is rebuilt from the result and {witness.names[0]}"
        return preserves(why, witness, undo=verdict.undo, domain=domain)
    known = torch.tensor(other) if is_number(other) else call.static(other)
    if known is not None and not _is_finite(known):
        loss = "the static summand is infinite, and absorbs every finite number"
        return where_kept(call, torch.isfinite(known), "", estimate, loss)
    why = "the other operand is static, so taking it off again rebuilds the operand"
    return preserves(why, undo=verdict.undo, domain=domain)


def _is_finite(known: Tensor) -> bool:
    # Most are, and their sum is found sooner than each element is looked at.
    return math.isfinite(abs(known.sum().item())) or bool(torch.isfinite(known).all())


def _less_other(own: float, weight: float, run: Run) -> Tensor:
    other = run.other
    if isinstance(other, Tensor):
        other = widened(other.to(run.output.dtype))
    return _divided(widened(run.output) - weight * other, own, run)


def _rounds(call: Call) -> bool:
    """Whether the result is of a floating-point dtype that does not hold all integers of the operand's dtype."""
    before, after = call.before.dtype, call.value.dtype
    return not (before.is_floating_point or before.is_complex) and not widens(before, after) and _inexact(after)


def _inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _rounded(call: Call) -> Verdict:
    before, after = call.before.dtype, call.value.dtype
    return erases(f"large {short(before)} numbers are rounded to {short(after)}", confidence=REFINED)


def _scaled(call: Call, factor: Any, estimate: Callable[[Run], Tensor]) -> Verdict:
    """A product with a number: S where the number has an inverse."""
    if factor == 0:
        return erases("the factor is zero", call.elements(), confidence=REFINED)
    if _inexact(call.value.dtype):
        if not math.isfinite(abs(factor)):
            return erases(f"the factor is {factor}", call.elements(), confidence=REFINED)
        why = f"the factor {factor} is not zero, so dividing by it undoes it"
        return from_result(why, estimate, domain="the result neither overflows nor underflows")
    if call.before.dtype is torch.bool:
        return from_result("True becomes the factor, and False zero", estimate)
    zeros = trailing_zeros(int(factor))
    if zeros:
        why = f"the factor {factor} moves the highest bits out"
        return erases(why, bits=per_element(call, zeros), confidence=REFINED)
    return from_result(f"the odd factor {factor} has an inverse among integers that wrap around", estimate)


def _over(factor: Any, run: Run) -> Tensor:
    return _divided(widened(run.output), factor, run)


def _divided(value: Tensor, factor: Any, run: Run) -> Tensor:
    """Divide by a number; among integers, by its inverse modulo the dtype's range."""
    if _inexact(value.dtype):
        return value / factor
    if run.before.dtype is torch.bool:
        return value != 0
    return value * odd_inverse(torch.as_tensor(int(factor)).to(value.dtype))


@labels(operator.mul, operator.imul, torch.multiply, ops="mul", methods="__mul__ __rmul__ __imul__ multiply")
@broadcasts
def mul(call: Call) -> Verdict:
    """A product: the result over the other operand, where that is not zero."""
    other = _other(call)
    if other is call.operands[0]:
        return _squared(call)
    if _rounds(call):
        return _rounded(call)
    if call.value.dtype is torch.bool:
        return _masked(call, other)
    if is_number(other):
        return _scaled(call, other, partial(_over, other))
    if _is_mask(other):
        return _masked(call, other)
    rate, total = zero_rate(other) or zero_rate(call.operands[0]), elements(call.value)
    if rate:
        why = f"a random mask zeroes each element with probability {rate}"
        return erases(why, None if total is None else rate * total, confidence=REFINED, expected=True)
    return _product(call, other)


def _squared(call: Call) -> Verdict:
    if call.before.dtype is torch.bool:
        return unchanged("a truth value times itself is itself")
    bits = None if call.before.dtype.is_complex else call.elements()
    return erases("both signs give one result: one bit per element", bits=bits)


def _product(call: Call, other: Any) -> Verdict:
    """A product with another tensor, or with a number that is computed from sizes."""
    if call.before.dtype is torch.bool:
        return erases("a mask of zeros and ones is lost where the other factor is zero")
    known, value = call.static(other), other.meta["val"]
    if known is not None:
        return _static_factor(call, known) if _inexact(call.value.dtype) else _static_integers(call, known)
    if not _inexact(call.value.dtype) or (isinstance(value, Tensor) and not _inexact(value.dtype)):
        return unproven("whether an integer factor has an inverse, or is zero, depends on its values")
    why = f"dividing by {other.name} undoes it"
    return from_result(why, _over_other, witness_of(call, other), OPERATOR, "it is not zero")


def _static_factor(call: Call, factor: Tensor) -> Verdict:
    kept = torch.tensor(True) if bool(factor.all()) and _is_finite(factor) else (factor != 0) & torch.isfinite(factor)
    why = "no element of the static factor is zero, so dividing by it undoes it"
    return where_kept(call, kept, why, _over_other, "the static factor has zeros, or elements that are not finite")


def _static_integers(call: Call, factor: Tensor) -> Verdict:
    kept = factor % 2 == 1
    why = "every element of the static factor is odd and has an inverse among integers that wrap around"
    if bool(kept.all()):
        return where_kept(call, kept, why, _over_other, "")
    return erases("an even factor moves the highest bits out", confidence=REFINED)


def _over_other(run: Run) -> Tensor:
    other, value = run.other, widened(run.output)
    if not isinstance(other, Tensor):
        return value / other
    return value / widened(other) if _inexact(value.dtype) else value * odd_inverse(other.to(value.dtype))


def _masked(call: Call, other: Any) -> Verdict:
    """A product with a mask of zeros and ones."""
    known = torch.tensor(other) if isinstance(other, bool) else call.static(other)
    if known is None or call.is_dynamic(other):
        return erases("a mask of zeros and ones erases what it zeroes")
    return where_kept(call, known, "the mask has no zero", as_it_is, "the static mask zeroes elements")


@labels(operator.truediv, operator.itruediv, operator.floordiv, operator.ifloordiv, torch.floor_divide)
@labels(ops="div divide true_divide", methods="__truediv__ __itruediv__ __div__ __idiv__ __rtruediv__ __rdiv__")
@labels(methods="floor_divide __floordiv__ __ifloordiv__ __rfloordiv__", atens="floor_divide")
@broadcasts
def div(call: Call) -> Verdict:
    """A quotient: the result times the divisor, or the dividend over the result."""
    left, right = pair(call)
    if plain_name(call) in _REVERSED:
        left, right = right, left
    if left is right:
        return erases("a value over itself is one", call.elements(), confidence=REFINED)
    if call.node.kwargs.get("rounding_mode") is not None or "floor" in plain_name(call):
        return _floored(call, left, right)
    if _rounds(call):
        return _rounded(call)
    return _quotient(call, right) if left is call.operands[0] else _divisor(call, left)


_REVERSED = ("rdiv", "rtruediv", "rfloordiv")


def _floored(call: Call, left: Any, right: Any) -> Verdict:
    whole = not _inexact(call.before.dtype) and call.before.dtype is call.value.dtype
    if whole and left is call.operands[0] and is_number(right) and right == 1:
        return unchanged("integers over 1 stay what they are")
    return erases("rounding erases the fraction")


def _quotient(call: Call, divisor: Any) -> Verdict:
    """The operand over something."""
    if is_number(divisor) or isinstance(divisor, bool):
        if divisor == 0 or not math.isfinite(abs(divisor)):
            return erases(f"the divisor is {divisor}", call.elements(), confidence=REFINED)
        why = f"the divisor {divisor} is a number other than zero, so multiplying by it undoes it"
        return from_result(why, _times_other, domain="the result neither overflows nor underflows")
    known = call.static(divisor)
    if known is not None:
        kept = (known != 0) & torch.isfinite(known)
        why = "no element of the static divisor is zero, so multiplying by it undoes it"
        return where_kept(call, kept, why, _times_other, "the static divisor has zeros, or infinite elements")
    if not _inexact(call.before.dtype):
        return unproven("whether an integer survives a division depends on the divisor")
    why = f"multiplying by {divisor.name} undoes it"
    return from_result(why, _times_other, witness_of(call, divisor), OPERATOR, "it is neither zero nor infinite")


def _divisor(call: Call, dividend: Any) -> Verdict:
    """Something over the operand."""
    if is_number(dividend):
        if dividend == 0:
            return erases("the dividend is zero", call.elements(), confidence=REFINED)
        return from_result(f"{dividend} over the result is the operand", _other_over, domain="it is not zero")
    known = call.static(dividend)
    if known is not None:
        why = "the static dividend over the result is the operand"
        return where_kept(call, known != 0, why, _other_over, "the static dividend has zeros")
    if not _inexact(call.before.dtype):
        return unproven("whether an integer divisor comes back depends on the dividend")
    why = f"{dividend.name} over the result is the operand"
    return from_result(why, _other_over, witness_of(call, dividend), OPERATOR, "neither is zero")


def _times_other(run: Run) -> Tensor:
    return widened(run.output) * run.other


def _other_over(run: Run) -> Tensor:
    other = run.other
    return (widened(other) if isinstance(other, Tensor) else other) / widened(run.output)


def is_number(value: Any) -> bool:
    """Whether an argument is a number, and no truth value."""
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


def _is_mask(operand: Any) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else operand
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool)


@axis_rule(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow)
@axis_rule(operator.gt, operator.lt, operator.ge, operator.le, operator.eq, operator.ne, operator.and_, operator.or_)
@axis_rule(ops="add sub rsub mul div true_divide pow remainder fmod floor_divide maximum minimum where masked_fill")
@axis_rule(ops="clamp clamp_min clamp_max clip lerp addcmul addcdiv")
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
@axis_rule(ops="bitwise_not tril triu")
@axis_rule(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
@axis_rule(methods="to type float double half bfloat16 int long bool short type_as cpu cuda", atens="_to_copy")
def unary_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    return mapped(call.operand.layout, "it acts on each element on its own")
