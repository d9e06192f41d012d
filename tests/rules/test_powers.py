"""Powers with constant exponents, constant bases, and neither."""

import math
import operator

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.tensor([-2.0, -0.5, 0.25, 1.0, 3.0])
POSITIVE = X.abs() + 0.1
COMPLEX = torch.complex(X, X.flip(0))
POWERS = (torch.pow, torch.float_power, torch.Tensor.pow, operator.pow)


@pytest.mark.parametrize("function", POWERS)
@pytest.mark.parametrize("exponent", [1, 3, 3.0, -1, -5])
def test_odd_exponents_keep_the_sign(certified, function, exponent):
    verdict = certified(function, X, exponent)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)


@pytest.mark.parametrize("function", POWERS)
def test_even_exponents_erase_it(certified, function):
    for exponent in (2, 4.0, -2):
        assert certified(function, X, exponent).erasure.bits == 5
    assert certified(function, X, 0).erasure.elements == 5


@pytest.mark.parametrize("exponent", [0.5, -0.5, 2.5, 1 / 3])
def test_fractional_exponents_hold_for_positive_operands(certified, exponent):
    verdict = certified(torch.pow, POSITIVE, exponent)
    assert (verdict.label, verdict.domain) == (Label.S, "x >= 0")


def test_constant_bases(certified):
    for base in (2, 0.5, 10.0):
        assert certified(torch.pow, base, X).label is Label.S
        assert certified(torch.Tensor.__rpow__, X, base).label is Label.S
    assert certified(torch.pow, 1, X).erasure.elements == 5
    assert certified(torch.pow, -2.0, X).label is Label.K


def test_exponents_and_bases_per_element(certified):
    odd, fractional = torch.tensor([1.0, 3.0, -1.0, 5.0, 3.0]), torch.tensor([0.5, 1.5, -0.5, 3.0, 1.0])
    assert certified(torch.pow, X, odd, dynamic={id(X)}).label is Label.S
    assert certified(torch.pow, POSITIVE, fractional, dynamic={id(POSITIVE)}).label is Label.S
    assert certified(torch.pow, X, odd + 1, dynamic={id(X)}).label is Label.K
    assert certified(torch.pow, X, odd - 1, dynamic={id(X)}).erasure.elements == 1
    assert certified(torch.pow, X, odd).label is Label.K
    bases = torch.tensor([2.0, 0.5, 1.0, 3.0, -1.0])
    assert certified(torch.pow, bases, X, dynamic={id(X)}).erasure.elements == 2
    assert certified(torch.pow, POSITIVE, X, dynamic={id(X)}).label is Label.S
    assert certified(torch.pow, X, X).label is Label.K


def test_integers_and_truth_values(certified):
    integers = torch.arange(-5, 6)
    assert certified(torch.pow, integers, 2).label is Label.K
    assert certified(torch.pow, integers, 3).label is Label.K  # it wraps around
    assert certified(torch.pow, integers, 1).label is Label.S
    assert certified(torch.pow, integers.to(torch.int8), 3.0).label is Label.S
    assert certified(torch.pow, integers.to(torch.int8), 0.5).label is Label.K
    assert certified(torch.pow, 2, integers.abs()).label is Label.K
    assert certified(torch.float_power, 2, integers.to(torch.int8)).label is Label.S
    assert certified(torch.float_power, 3, X > 0).label is Label.S


def test_complex_numbers(certified):
    for exponent in (0.5, -1, 1, -0.3):
        assert certified(torch.pow, COMPLEX, exponent).label is Label.S
    for exponent in (2, 3, 1.5):
        assert certified(torch.pow, COMPLEX, exponent).label is Label.K
    assert certified(torch.pow, 2.0, COMPLEX).label is Label.K


def test_captured_powers(verdict_of):
    batch = torch.rand(2, 3, 4) + 0.1
    assert verdict_of(lambda x: x**2, batch).erasure.bits == 12
    assert verdict_of(lambda x: x**3, batch).label is Label.S
    verdict = verdict_of(lambda x: 2**x, batch)
    assert (verdict.label, verdict.rule) == (Label.S, "powers.reversed_power")


def test_integers_to_a_whole_power_and_to_a_float_are_told_apart(certified):
    numbers = torch.tensor([3, 254], dtype=torch.uint8)
    assert certified(torch.pow, numbers, 2.0).label is Label.S
    assert certified(torch.pow, numbers, 2).label is Label.K


@pytest.mark.parametrize("exponent", [math.inf, -math.inf, math.nan])
def test_powers_that_are_not_finite_erase(certified, exponent):
    assert certified(torch.pow, torch.rand(3) + 1, exponent).label is Label.K
