"""Functions that are constant over intervals or choose one of two: rounding, remainders, signs, clamps, extremes."""

from __future__ import annotations

import operator
from typing import Any

import torch

from bwsk_fx.rules.bijections import unchanged
from bwsk_fx.rules.broadcasting import broadcasts
from bwsk_fx.rules.registry import Call, erases, labels
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.verdict import REFINED, Verdict


@labels(*spellings("floor ceil trunc fix round frac"))
def rounding(call: Call) -> Verdict:
    """Erases the fraction, or everything else; integers stay what they are."""
    whole = not (call.before.is_floating_point() or call.before.is_complex())
    decimals = call.argument(1, "decimals", 0) if plain_name(call) == "round" else 0
    if whole and decimals >= 0:
        return unchanged("integers stay what they are")
    return erases("it is constant over whole intervals, or repeats in them")


@labels(operator.mod, operator.imod, *spellings("remainder fmod"), methods="__mod__ __imod__ __rmod__")
def remainder(_: Call) -> Verdict:
    """Repeats every divisor."""
    return erases("dividends that are a multiple of the divisor apart have one remainder")


@labels(*spellings("sign sgn signbit heaviside"))
def signs(call: Call) -> Verdict:
    """Leaves the sign, or for `sgn` of complex numbers the direction."""
    if call.before.dtype is torch.bool and plain_name(call) in ("sign", "sgn"):
        return unchanged("truth values stay what they are")
    return erases("all that is left is the sign")


@labels(*spellings("copysign"))
def copysign(call: Call) -> Verdict:
    """Replaces the sign of its first argument, and takes nothing but the sign of its second."""
    if call.argument(0, "input") is not call.operands[0]:
        return erases("all that is left is the sign")
    return erases("the sign is replaced: one bit per element", bits=call.elements(), confidence=REFINED)


@labels(*spellings("nextafter"))
def nextafter(_: Call) -> Verdict:
    """A number and its two neighbours give one result."""
    return erases("a number and its neighbours on both sides give that number")


@labels(*spellings("nan_to_num"))
def nan_to_num(_: Call) -> Verdict:
    """Leaves finite numbers alone."""
    return unchanged("finite numbers stay what they are", "the operand is finite")


@labels(*spellings("clamp clip clamp_min clamp_max"))
@broadcasts
def clamp(call: Call) -> Verdict:
    """Many operands give a bound; bounds at the ends of the dtype's range leave finite numbers alone."""
    low, high = _bounds(call)
    dtype = call.before.dtype
    if not dtype.is_complex and dtype is not torch.bool and call.value.dtype is dtype:
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        if _at_most(low, info.min) and _at_most(_negative(high), -info.max):
            return unchanged("the bounds are the ends of the dtype's range", "the operand is finite")
    return erases("everything outside the bounds becomes a bound")


def _bounds(call: Call) -> tuple[Any, Any]:
    name = plain_name(call)
    low = None if name == "clamp_max" else call.argument(1, "min")
    high = call.argument(1 if name == "clamp_max" else 2, "max")
    return low, high


def _negative(bound: Any) -> Any:
    return -bound if isinstance(bound, (int, float)) else bound


def _at_most(bound: Any, limit: float) -> bool:
    return bound is None or (isinstance(bound, (int, float)) and bound <= limit)


@labels(*spellings("maximum minimum fmax fmin"))
@broadcasts
def extreme(call: Call) -> Verdict:
    """Takes one of two operands; the other is gone."""
    if call.argument(0, "input") is call.argument(1, "other"):
        return unchanged("both operands are one and the same")
    return erases("of two operands, one is gone, element by element")
