"""Powers: of an operand, or with an operand as exponent."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import on_integers, one_bit_each, unchanged, widened
from bwsk_fx.rules.broadcasting import broadcasts, from_result, where_kept
from bwsk_fx.rules.elementwise import is_number
from bwsk_fx.rules.registry import Call, erases, labels, unproven
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run
from bwsk_fx.verdict import REFINED, Verdict


@labels(operator.pow, operator.ipow, *spellings("pow float_power"), methods="__pow__ __ipow__")
@broadcasts
def power(call: Call) -> Verdict:
    """A power: with a constant exponent, or of a constant base."""
    return _power(call, call.argument(0, "input", call.argument(0, "self")), call.argument(1, "exponent"))


@labels(methods="__rpow__")
@broadcasts
def reversed_power(call: Call) -> Verdict:
    """A power whose exponent comes first."""
    return _power(call, call.argument(1, "other"), call.argument(0, "self"))


def _power(call: Call, base: Any, exponent: Any) -> Verdict:
    if base is exponent:
        return erases("a value to the power of itself falls, then rises")
    if base is call.operands[0]:
        if is_number(exponent):
            return _with_exponent(call, exponent)
        known = call.static(exponent)
        why = "an exponent that varies: negative bases have no real power, and even exponents erase the sign"
        return erases(why) if known is None else _with_exponents(call, known)
    if is_number(base):
        return _of_base(call, base)
    known = call.static(base)
    return erases("a base that varies: a base of one erases the exponent") if known is None else _of_bases(call, known)


def _with_exponent(call: Call, exponent: Any) -> Verdict:
    if exponent == 0:
        return erases("everything to the power of zero is one", call.elements(), confidence=REFINED)
    if not (isinstance(exponent, complex) or math.isfinite(exponent)):
        return erases("an infinite power, or one that is no number, tells at most whether the operand is above one")
    if exponent == 1 and call.before.dtype is call.value.dtype:
        return unchanged("the power of one is the operand")
    if not (call.before.is_floating_point() or call.before.is_complex()):
        function = _Power(exponent, plain_name(call) == "float_power", type(exponent))
        return on_integers(f"the power {exponent}", function, call.before.dtype)
    if call.before.is_complex() or isinstance(exponent, complex):
        return _complex_power(exponent)
    if exponent % 2 == 0:
        return one_bit_each(call, "both signs give one result: one bit per element", REFINED)
    why = f"the power {exponent} is strictly monotone on its domain, so its root undoes it"
    domain = "the result neither overflows nor underflows" if float(exponent).is_integer() else "x >= 0"
    return from_result(why, partial(_root, exponent), domain=domain)


@dataclass(frozen=True)
class _Power:
    """`x ** exponent`, as a value that can be a key; 2 and 2.0 are equal, and give different results."""

    exponent: Any
    in_double: bool
    kind: type

    def __call__(self, base: Tensor) -> Tensor:
        return torch.float_power(base, self.exponent) if self.in_double else torch.pow(base, self.exponent)


@dataclass(frozen=True)
class _Exponential:
    """`base ** x`, as a value that can be a key; 2 and 2.0 are equal, and give different results."""

    base: Any
    in_double: bool
    kind: type

    def __call__(self, exponent: Tensor) -> Tensor:
        return torch.float_power(self.base, exponent) if self.in_double else torch.pow(self.base, exponent)


def _complex_power(exponent: Any) -> Verdict:
    if not isinstance(exponent, complex) and (abs(exponent) < 1 or exponent == -1):
        return from_result(f"the principal power {exponent} keeps arguments apart", partial(_principal_root, exponent))
    return erases(f"several complex numbers have one and the same power {exponent}")


def _root(exponent: float, run: Run) -> Tensor:
    value = widened(run.output)
    if not float(exponent).is_integer():
        return value ** (1 / exponent)
    return torch.sign(value) * value.abs() ** (1 / exponent)


def _principal_root(exponent: float, run: Run) -> Tensor:
    return widened(run.output) ** (1 / exponent)


def _with_exponents(call: Call, exponents: Tensor) -> Verdict:
    """Static exponents, one per element."""
    if call.before.is_complex() or exponents.is_complex() or not call.before.is_floating_point():
        return unproven("powers of integers and complex numbers with several exponents are covered by no rule")
    if bool((exponents == 0).any()):
        return where_kept(call, exponents != 0, "", _roots, "everything to the power of zero is one")
    kept = exponents.to(torch.float64) % 2 != 0
    if not bool(kept.all()):
        return erases("even exponents erase the sign", confidence=REFINED)
    why = "no exponent is even, so each power is strictly monotone on its domain, and its root undoes it"
    return from_result(why, _roots, domain="x >= 0, or the exponent is an integer")


def _roots(run: Run) -> Tensor:
    exponents = run.argument(1, "exponent").to(torch.float64)
    value = widened(run.output)
    magnitude = value.abs() ** (1 / exponents)
    return torch.where(exponents == exponents.round(), torch.sign(value) * magnitude, value ** (1 / exponents))


def _of_base(call: Call, base: Any) -> Verdict:
    """A number to the power of the operand."""
    if not call.before.is_floating_point():
        if call.before.is_complex() or isinstance(base, complex):
            return erases("exponentials are periodic over the complex numbers")
        function = _Exponential(base, plain_name(call) == "float_power", type(base))
        return on_integers(f"{base} to the power", function, call.before.dtype)
    if isinstance(base, complex):
        return erases("exponentials are periodic over the complex numbers")
    if base in (0, 1):
        return erases(f"the base is {base}", call.elements(), confidence=REFINED)
    if base < 0:
        return erases("a negative base has a real power for integers only", confidence=REFINED)
    why = f"an exponential with base {base} is strictly monotone and undone by its logarithm"
    return from_result(why, partial(_logarithm, base), domain="the result neither overflows nor underflows")


def _logarithm(base: float, run: Run) -> Tensor:
    return torch.log(widened(run.output).to(torch.float64)) / math.log(base)


def _of_bases(call: Call, bases: Tensor) -> Verdict:
    """Static bases, one per element, to the power of the operand."""
    if bases.is_complex() or not call.before.is_floating_point():
        return unproven("powers of several bases with integer or complex exponents are covered by no rule")
    kept = (bases > 0) & (bases != 1)
    why = "every base is positive and not one, so the logarithm undoes it"
    loss = "bases of zero and one erase the exponent, and negative ones have a real power for integers only"
    return where_kept(call, kept, why, partial(_logarithms, bases), loss)


def _logarithms(bases: Tensor, run: Run) -> Tensor:
    return torch.log(widened(run.output)) / torch.log(bases.to(torch.float64))
