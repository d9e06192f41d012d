"""Special functions: what `torch.special` has beyond the elementary ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import Bijection, bisected, one_to_one, undo_by
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.verdict import REFINED, Verdict

# Beyond, erfcx(x) is 1 / (x sqrt(pi)) to ten digits.
_FAR = 1e5


def _erfcx_inverse(y: Tensor) -> Tensor:
    near = bisected(torch.special.erfcx, -26.7, 2 * _FAR, False, y)
    far = 1 / (y * math.sqrt(math.pi))
    return torch.where(far > _FAR, far, near)


def _log_ndtr_inverse(y: Tensor) -> Tensor:
    near = bisected(torch.special.log_ndtr, -2e4, 40.0, True, y)
    far = -torch.sqrt(-2 * y)
    # log_ndtr(x) is -x^2 / 2 - log(-x) - log(2 pi) / 2, up to 1 / x^2.
    far = -torch.sqrt(-2 * (y + torch.log(-far) + math.log(2 * math.pi) / 2))
    return torch.where(y < -1e8, far, near)


_BISECTED: Mapping[str, Bijection] = {
    "erfcx": Bijection(_erfcx_inverse, "short of overflow"),
    "log_ndtr": Bijection(_log_ndtr_inverse, "until it rounds to 0"),
    "i1": Bijection(partial(bisected, torch.special.i1, -710.0, 710.0, True), "short of overflow"),
}


@labels(*spellings(" ".join(_BISECTED) + " modified_bessel_i1"))
def bisection(call: Call) -> Verdict:
    """Strictly monotone, without a closed inverse: bisection finds the operand."""
    name = plain_name(call).removeprefix("modified_bessel_")
    return one_to_one(call, name, getattr(torch.special, name), _BISECTED[name])


@labels(*spellings("i1e entr lgamma gammaln"))
def rises_and_falls(call: Call) -> Verdict:
    """Not monotone: values have two inputs or more."""
    return erases("it rises and falls, so that values have two inputs or more")


@labels(*spellings("digamma psi polygamma mvlgamma multigammaln"))
def between_poles(_: Call) -> Verdict:
    """Takes the same values again between any two of its poles, or on either side of its minimum."""
    return erases("it takes the same values between any two of its poles, or on either side of its minimum")


@labels(*spellings("bessel_j1 bessel_y0 bessel_y1 airy_ai"))
def oscillates(_: Call) -> Verdict:
    """Has infinitely many zeros."""
    return erases("it oscillates: infinitely many operands give zero")


@labels(*spellings("modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1"))
@labels(*spellings("igamma igammac gammainc gammaincc zeta"))
def undefined_below(_: Call) -> Verdict:
    """Defined on a half line only, and NaN on the other."""
    return erases("it is NaN on a half line, where all operands become one")


@labels(*spellings("ndtr"))
def normal_distribution(_: Call) -> Verdict:
    """Strictly increasing, but computed as (1 + erf) / 2, which has no relative precision below zero."""
    return unproven("it is computed from 1 + erf, which rounds the left tail away before the result is formed")


_POLYNOMIALS = "chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w"
_SHIFTED = " ".join(f"shifted_{name}" for name in _POLYNOMIALS.split())
_FIRST_DEGREE = {
    # name: (slope, value at zero)
    "chebyshev_polynomial_t": (1, 0),
    "chebyshev_polynomial_u": (2, 0),
    "chebyshev_polynomial_v": (2, -1),
    "chebyshev_polynomial_w": (2, 1),
    "shifted_chebyshev_polynomial_t": (2, -1),
    "shifted_chebyshev_polynomial_u": (4, -2),
    "shifted_chebyshev_polynomial_v": (4, -3),
    "shifted_chebyshev_polynomial_w": (4, -1),
    "hermite_polynomial_h": (2, 0),
    "hermite_polynomial_he": (1, 0),
    "laguerre_polynomial_l": (-1, 1),
    "legendre_polynomial_p": (1, 0),
}


@labels(*spellings(f"{_POLYNOMIALS} {_SHIFTED} hermite_polynomial_h hermite_polynomial_he"))
@labels(*spellings("laguerre_polynomial_l legendre_polynomial_p"))
def orthogonal_polynomial(call: Call) -> Verdict:
    """One-to-one in degree 1 only: a polynomial of degree n has n distinct zeros."""
    operand, degree = call.argument(0, "x", call.argument(0, "input")), call.argument(1, "n")
    degrees = {int(degree)} if isinstance(degree, (int, float)) else _values(call, degree)
    if operand is not call.operands[0]:
        return unproven("whether polynomials of several degrees differ at a point depends on the point")
    if degrees == {1}:
        slope, start = _FIRST_DEGREE[plain_name(call)]
        why = f"in degree 1 it is {slope} x + {start}"
        return preserves(why, confidence=REFINED, undo=undo_by(partial(_solved, slope, start)))
    return erases("a polynomial of degree n has n distinct zeros, and only degree 1 is one-to-one")


def _values(call: Call, degree: Any) -> set[int]:
    known = call.static(degree)
    return set() if known is None else {int(value) for value in known.unique().tolist()}


def _solved(slope: float, start: float, y: Tensor) -> Tensor:
    return (y - start) / slope
