"""Functions of two or three operands, of which one can be rebuilt from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import one_bit_each, widened
from bwsk_fx.rules.broadcasting import broadcasts, from_result, where_kept
from bwsk_fx.rules.elementwise import is_number, pair
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven, witness_of
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import OPERATOR, REFINED, Verdict


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return widened(value) if value.is_floating_point() or value.is_complex() else value.to(torch.float64)


@labels(*spellings("hypot"))
@broadcasts
def hypot(call: Call) -> Verdict:
    """Even in both operands."""
    return one_bit_each(call, "both signs give one result: one bit per element")


@labels(*spellings("atan2 arctan2"))
@broadcasts
def atan2(call: Call) -> Verdict:
    """The angle of a point: one coordinate and the angle give the other coordinate."""
    height, width = pair(call)
    if height is width or height is not call.operands[0]:
        return erases("points in one direction from the origin have one angle")
    if not call.before.is_floating_point():
        return unproven("angles of integer points are covered by no rule")
    known = call.static(width)
    if known is not None and not bool((known != 0).all()):
        return erases("where the static coordinate is zero, the angle is that of an axis", confidence=REFINED)
    why = "the tangent of the result times the other coordinate is the operand"
    return from_result(why, _height, witness_of(call, width), OPERATOR, "the other coordinate is not zero")


def _height(run: Run) -> Tensor:
    height = torch.tan(_wide(run.output)) * _wide(run.argument(1, "other"))
    upright = run.output.abs() == torch.tensor(math.pi / 2, dtype=torch.float64).to(run.output.dtype)
    return torch.where(upright, math.inf * run.output.sign().double(), height)


@labels(*spellings("logaddexp logaddexp2"))
@broadcasts
def logaddexp(call: Call) -> Verdict:
    """A sum of exponentials: the result's exponential less the other one."""
    left, right = pair(call)
    if call.before.is_complex():
        return erases("exponentials are periodic over the complex numbers")
    base = 2.0 if plain_name(call) == "logaddexp2" else math.e
    if left is right:
        return from_result("a value with itself is moved by a constant", partial(_moved_back, base))
    other = right if left is call.operands[0] else left
    why = "the exponential of the result less that of the other operand is the operand's"
    rebuild = partial(_log_difference, base)
    return from_result(why, rebuild, witness_of(call, other), OPERATOR, "the other operand does not absorb it")


def _moved_back(base: float, run: Run) -> Tensor:
    return _wide(run.output) - math.log(2) / math.log(base)


def _log_difference(base: float, run: Run) -> Tensor:
    scale = math.log(base)
    result, other = _wide(run.output), _wide(run.other)
    return result + torch.log(-torch.expm1((other - result) * scale)) / scale


@labels(*spellings("xlogy xlog1py"))
@broadcasts
def xlogy(call: Call) -> Verdict:
    """A value times a logarithm."""
    factor, inside = pair(call)
    if factor is inside:
        return erases("it falls and rises")
    if not call.before.is_floating_point():
        return unproven("products of integers and logarithms are covered by no rule")
    if factor is call.operands[0]:
        known = call.static(inside)
        if known is not None:
            return _over_known_logarithm(call, known)
        why = "the result over the logarithm is the operand"
        rebuild = partial(_over_logarithm, plain_name(call))
        domain = "the logarithm is finite and not zero"
        return from_result(why, rebuild, witness_of(call, inside), OPERATOR, domain)
    if is_number(factor):
        if factor == 0:
            return erases("the factor is zero", call.elements(), confidence=REFINED)
        why = "the factor is not zero, so the exponential undoes it"
        return from_result(why, partial(_exponential, plain_name(call)), domain="x > 0")
    known = call.static(factor)
    if known is None:
        return unproven("the values of the factor are not at hand")
    rebuild = partial(_exponential, plain_name(call))
    return where_kept(call, known != 0, "no element of the factor is zero", rebuild, "the static factor has zeros")


def _over_known_logarithm(call: Call, inside: Tensor) -> Verdict:
    name = plain_name(call)
    logarithm = torch.log1p(inside) if name == "xlog1py" else torch.log(inside)
    kept = torch.isfinite(logarithm) & (logarithm != 0)
    why = "the result over the static logarithm is the operand"
    loss = "the static logarithm is zero or not finite"
    return where_kept(call, kept, why, partial(_over_logarithm, name), loss)


def _over_logarithm(name: str, run: Run) -> Tensor:
    inside = _wide(run.other)
    inside = inside if isinstance(inside, Tensor) else torch.tensor(inside, dtype=torch.float64)
    return _wide(run.output) / (torch.log1p(inside) if name == "xlog1py" else torch.log(inside))


def _exponential(name: str, run: Run) -> Tensor:
    exponent = _wide(run.output) / _wide(run.other)
    return torch.expm1(exponent) if name == "xlog1py" else torch.exp(exponent)


@labels(*spellings("ldexp"))
@broadcasts
def ldexp(call: Call) -> Verdict:
    """A product with a power of two."""
    mantissa, exponent = pair(call)
    if mantissa is exponent or mantissa is not call.operands[0]:
        return unproven("whether the exponent comes back depends on the mantissa, which can be zero")
    return from_result(
        "dividing by the power of two undoes it",
        _unscaled,
        witness_of(call, exponent),
        OPERATOR,
        "the result neither overflows nor underflows",
    )


def _unscaled(run: Run) -> Tensor:
    # The operator's own power: it is rounded to the exponent's dtype, or to the default one.
    return _wide(run.output) / _wide(torch.pow(2.0, run.argument(1, "other")))


@labels(*spellings("frexp"))
def frexp(call: Call) -> Verdict:
    """Mantissa and exponent make the number."""
    return preserves("the mantissa times two to the power of the exponent is the operand", undo=Undo(_put_together))


def _put_together(run: Run) -> Tensor:
    mantissa, exponent = run.output
    # In two steps, since the power of two alone can overflow where the product does not.
    half = exponent // 2
    return _wide(mantissa) * torch.exp2(half.double()) * torch.exp2((exponent - half).double())


@labels(*spellings("lerp"))
@broadcasts
def lerp(call: Call) -> Verdict:
    """An interpolation, start + weight (end - start): the start comes back where the weight is not one."""
    start, end = call.argument(0, "input"), call.argument(1, "end")
    weight = call.argument(2, "weight")
    if start is not call.operands[0] or start is end or start is weight:
        return unproven("only the start of an interpolation is covered")
    known = call.static(weight)
    if is_number(weight) or known is not None:
        kept = torch.as_tensor(weight if known is None else known) != 1
        if not bool(kept.all()):
            return where_kept(call, kept, "", _start, "a weight of one takes the end alone")
    why = "taking the weighted end off the result leaves the weighted start"
    return from_result(why, _start, witness_of(call, end, weight), OPERATOR, "the weight is not one")


def _start(run: Run) -> Tensor:
    end, weight = _wide(run.argument(1, "end")), _wide(run.argument(2, "weight"))
    return (_wide(run.output) - weight * end) / (1 - weight)


@labels(*spellings("addcmul addcdiv"))
@broadcasts
def added(call: Call) -> Verdict:
    """A sum, input + value * a * b or input + value * a / b: the input is the result less the rest."""
    first, factors = call.argument(0, "input"), _factors(call)
    if first is not call.operands[0] or any(factor is first for factor in factors):
        return unproven("only the summand is covered, not the factors")
    exact = not (call.before.is_floating_point() or call.before.is_complex())
    if exact and not isinstance(call.kwargs.get("value", 1), int):
        # PyTorch rounds such a value to an integer first, or not, by the dtypes of the factors.
        return unproven("integers and a value that is none are covered by no rule")
    why = "the result less the product is the operand"
    domain = "the product does not absorb it"
    return from_result(why, _less_product, witness_of(call, *factors), OPERATOR, domain)


def _factors(call: Call | Run) -> Sequence[Any]:
    return call.argument(1, "tensor1"), call.argument(2, "tensor2")


def _less_product(run: Run) -> Tensor:
    dtype = run.output.dtype
    one, other = (widened(factor.to(dtype)) for factor in _factors(run))
    divides = "div" in str(getattr(run.target, "__name__", run.target))
    product = one / other if divides else one * other
    return widened(run.output) - run.kwargs.get("value", 1) * product
