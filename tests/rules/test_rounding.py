"""Functions that are constant over intervals or choose, and the cases in which they change nothing."""

import operator

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.randn(3, 4)
INTEGERS = torch.arange(-6, 6)


@pytest.mark.parametrize("name", ["floor", "ceil", "trunc", "fix", "round", "frac", "sign", "sgn", "signbit"])
def test_rounding_and_signs_are_k(certified, name):
    assert certified(getattr(torch, name), X).label is Label.K


def test_integers_stay_what_they_are(certified):
    for function in (torch.floor, torch.ceil, torch.trunc, torch.round):
        assert certified(function, INTEGERS).label is Label.S
    assert certified(torch.round, X, decimals=2).label is Label.K
    assert certified(torch.sgn, X > 0).label is Label.S
    assert certified(torch.sgn, INTEGERS).label is Label.K


@pytest.mark.parametrize("function", [torch.remainder, torch.fmod, operator.mod, torch.Tensor.__rmod__])
def test_remainders_are_k(certified, function):
    assert certified(function, X, 2).label is Label.K
    assert certified(function, X, X.flip(0)).label is Label.K


def test_signs_that_are_replaced(certified):
    sign = X.flip(0)
    assert certified(torch.copysign, X, sign).erasure.bits == 12
    assert certified(torch.copysign, X, -1.0).erasure.bits == 12
    assert certified(torch.copysign, X, sign, dynamic={id(sign)}).erasure is None
    assert certified(torch.heaviside, X, sign).label is Label.K
    assert certified(torch.nextafter, X, sign).label is Label.K


def test_clamps_erase_unless_their_bounds_are_out_of_reach(certified):
    for function in (lambda x: x.clamp(0, 1), lambda x: x.clamp_min(0), lambda x: torch.clip(x, max=2.0)):
        assert certified(function, X).label is Label.K
    lowest = torch.finfo(torch.float32).min
    assert certified(torch.clamp, X, lowest).label is Label.S
    assert certified(torch.clamp, X, lowest, -lowest).label is Label.S
    assert certified(torch.clamp_max, X, -lowest).label is Label.S
    assert certified(torch.clamp_max, X, lowest).label is Label.K
    assert certified(torch.clamp, X, X - 1, X + 1).label is Label.K


def test_extremes_choose(certified):
    for function in (torch.maximum, torch.minimum, torch.fmax, torch.fmin):
        assert certified(function, X, X.flip(0)).label is Label.K
        assert certified(function, X, X).label is Label.S


def test_finite_numbers_pass_nan_to_num(certified):
    verdict = certified(torch.nan_to_num, X)
    assert (verdict.label, verdict.domain) == (Label.S, "the operand is finite")
