"""Elementary functions of one operand: exponentials, logarithms, trigonometric and hyperbolic functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from bwsk_fx.rules.bijections import Bijection, identity, on_integers, one_bit_each, one_to_one
from bwsk_fx.rules.registry import Call, erases, labels
from bwsk_fx.rules.sizes import short
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.verdict import REFINED, Verdict

_OVERFLOW = "the result neither overflows nor underflows"
_SATURATION = "the result rounds to its limit"


def _power_of_ten(y: Tensor) -> Tensor:
    return torch.pow(10.0, y)


def _inverse_square(y: Tensor) -> Tensor:
    return torch.reciprocal(y * y)


def _normal_quantile_of_half(y: Tensor) -> Tensor:
    return -torch.special.ndtri(y / 2) / math.sqrt(2)


def _y_over_one_less_its_size(y: Tensor) -> Tensor:
    return y / (1 - y.abs())


def _mirrored_softplus_inverse(y: Tensor) -> Tensor:
    return y - torch.log(-torch.expm1(y))


BIJECTIONS: Mapping[str, Bijection] = {
    "neg": Bijection(torch.neg, integral=True),
    "positive": Bijection(identity, integral=True),
    "deg2rad": Bijection(torch.rad2deg),
    "rad2deg": Bijection(torch.deg2rad),
    "reciprocal": Bijection(torch.reciprocal, "x != 0"),
    "exp": Bijection(torch.log, _OVERFLOW, periodic=True),
    "exp2": Bijection(torch.log2, _OVERFLOW, periodic=True),
    "expm1": Bijection(torch.log1p, _OVERFLOW, periodic=True),
    "log": Bijection(torch.exp, "x > 0"),
    "log2": Bijection(torch.exp2, "x > 0"),
    "log10": Bijection(_power_of_ten, "x > 0"),
    "log1p": Bijection(torch.expm1, "x > -1"),
    "sqrt": Bijection(torch.square, "x >= 0"),
    "rsqrt": Bijection(_inverse_square, "x > 0"),
    "sinh": Bijection(torch.asinh, _OVERFLOW, periodic=True),
    "tanh": Bijection(torch.atanh, _SATURATION, periodic=True),
    "asin": Bijection(torch.sin, "|x| <= 1"),
    "acos": Bijection(torch.cos, "|x| <= 1"),
    "atan": Bijection(torch.tan, _SATURATION, limit=math.pi / 2),
    "asinh": Bijection(torch.sinh),
    "acosh": Bijection(torch.cosh, "x >= 1"),
    "atanh": Bijection(torch.tanh, "|x| < 1"),
    "sigmoid": Bijection(torch.logit, _SATURATION, periodic=True),
    "softsign": Bijection(_y_over_one_less_its_size, _SATURATION),
    "logsigmoid": Bijection(_mirrored_softplus_inverse, _OVERFLOW, periodic=True),
    "erf": Bijection(torch.erfinv, _SATURATION),
    "erfc": Bijection(_normal_quantile_of_half, _SATURATION),
    "erfinv": Bijection(torch.erf, "|x| < 1"),
    "ndtri": Bijection(torch.special.ndtr, "0 < x < 1"),
}
ALIASES: Mapping[str, str] = {
    "negative": "neg",
    "pos": "positive",
    "expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}


@labels(nn.Tanh, nn.Sigmoid, nn.Softsign, nn.LogSigmoid, operator.neg, operator.pos)
@labels(*spellings(" ".join([*BIJECTIONS, *ALIASES]) + " log_sigmoid_forward"))
@labels(methods="__neg__ __pos__")
def strictly_monotone(call: Call) -> Verdict:
    """Strictly monotone on its domain, with an inverse of its own."""
    name = plain_name(call).removesuffix("_forward")
    name = ALIASES.get(name, name)
    bijection, dtype = BIJECTIONS[name], call.value.dtype
    if bijection.domain == _SATURATION and dtype.is_floating_point:
        domain = f"|x| < {_last_apart(name, dtype):.3g}, where {_SATURATION} in {short(dtype)}"
        bijection = replace(bijection, domain=domain)
    return one_to_one(call, name, _function(name), bijection)


@cache
def _last_apart(name: str, dtype: torch.dtype) -> float:
    """Return the size of the operand whose result is the last one before a limit of the function in a dtype."""
    limits = _function(name)(torch.tensor([1e300, -1e300], dtype=torch.float64))
    last = BIJECTIONS[name].inverse(limits * (1 - torch.finfo(dtype).eps))
    return float(last[limits != 0].abs().amin())


def _function(name: str) -> Callable[[Tensor], Tensor]:
    holders = (torch, torch.special, nn.functional)
    return next(getattr(holder, name) for holder in holders if hasattr(holder, name))


@labels(*spellings("logit"))
def logit(call: Call) -> Verdict:
    """The inverse of the sigmoid; with `eps`, it clamps first."""
    if call.argument(1, "eps") is not None:
        return erases("it clamps to [eps, 1 - eps] first", confidence=REFINED)
    return one_to_one(call, "logit", torch.logit, Bijection(torch.sigmoid, "0 < x < 1"))


@labels(*spellings("abs absolute cosh square sinc i0 i0e bessel_j0 modified_bessel_i0 spherical_bessel_j0"))
@labels(operator.abs, methods="__abs__")
def even(call: Call) -> Verdict:
    """Even functions: the sign goes."""
    if call.before.dtype in (torch.bool, torch.uint8):
        name = plain_name(call)
        return on_integers(name, _function(name), call.before.dtype)
    if call.before.dtype.is_complex:
        return erases("it gives a number and its negative, or all numbers of one size, the same result")
    return one_bit_each(call, "both signs give one result: one bit per element")


@labels(*spellings("sin cos tan"))
def periodic(call: Call) -> Verdict:
    """Repeats every period; how much goes depends on how many periods the operand spans."""
    if not (call.before.is_floating_point() or call.before.is_complex()):
        name = plain_name(call)
        return on_integers(name, _function(name), call.before.dtype)
    return erases("it is periodic")
