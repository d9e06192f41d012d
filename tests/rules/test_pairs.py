"""Functions of two or three operands, of which one comes back."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

X = torch.tensor([[0.5, -2.0, 3.0], [-0.25, 4.0, -1.0]])
Y = torch.tensor([[1.5, 0.5, -2.0], [-4.0, 2.0, 0.75]])
Z = torch.tensor([[0.3, -1.5, 2.5], [0.5, 0.25, -0.5]])


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (torch.atan2, Y),
        (torch.logaddexp, Y),
        (torch.logaddexp2, Y),
        (torch.xlogy, Y.abs()),
        (torch.special.xlog1py, Y.abs()),
        (torch.ldexp, Y.to(torch.int32)),
    ],
)
def test_the_first_operand_is_rebuilt_from_the_second(certified, function, other):
    verdict = certified(function, X, other)
    assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.5, WitnessKind.OTHER_OPERAND)
    assert verdict.domain
    assert certified(function, X, other, dynamic={id(X)}).witness.kind is WitnessKind.NOTHING
    assert certified(function, X[:1], other).label is Label.S


def test_the_second_operand(certified):
    inside = Y.abs()
    assert certified(torch.logaddexp, X, Y, dynamic={id(Y)}).label is Label.S
    assert certified(torch.xlogy, X, inside, dynamic={id(inside)}).label is Label.S
    assert certified(torch.xlogy, 2.0, inside).label is Label.S
    assert certified(torch.xlogy, 0.0, inside).erasure.elements == 6
    assert certified(torch.atan2, X, Y, dynamic={id(Y)}).label is Label.K


def test_static_operands_are_looked_at(certified):
    ones = torch.tensor([1.0, 2.0, 3.0])
    assert certified(torch.xlogy, X, ones, dynamic={id(X)}).erasure.elements == 2
    assert certified(torch.special.xlog1py, X, ones - 1, dynamic={id(X)}).erasure.elements == 2
    assert certified(torch.atan2, X, ones - 1, dynamic={id(X)}).label is Label.K


def test_one_operand_twice(certified):
    assert certified(torch.logaddexp, X, X).label is Label.S
    assert certified(torch.logaddexp2, X, X).label is Label.S
    assert certified(torch.atan2, X, X).label is Label.K
    assert certified(torch.xlogy, Z, Z).label is Label.K


def test_hypotenuses_erase_the_sign(certified):
    assert certified(torch.hypot, X, Y).erasure.bits == 6


def test_mantissa_and_exponent_are_the_number(certified):
    for scale in (1.0, 1e-42, 1e38):
        assert certified(torch.frexp, X * scale / 4).label is Label.S


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.75, -2.0, Z])
def test_interpolations_give_their_start_back(certified, weight):
    verdict = certified(torch.lerp, X, Y, weight)
    assert (verdict.label, len(verdict.witness.names)) == (Label.S, 2 if isinstance(weight, torch.Tensor) else 1)


def test_interpolations_that_take_the_end(certified):
    assert certified(torch.lerp, X, Y, 1.0).erasure.elements == 6
    weight = torch.tensor([0.5, 1.0, 2.0])
    assert certified(torch.lerp, X, Y, weight, dynamic={id(X)}).erasure.elements == 2


@pytest.mark.parametrize("function", [torch.addcmul, torch.addcdiv])
def test_fused_products_are_taken_off(certified, function):
    verdict = certified(function, X, Y, Z, value=0.5)
    assert (verdict.label, len(verdict.witness.names)) == (Label.S, 2)
    assert certified(function, X[:1], Y, Z).label is Label.S
    assert certified(function, X, Y, Z, dynamic={id(Y)}).label is Label.GRAY


def test_fused_products_of_integers(certified):
    numbers = torch.tensor([-(2**62), 3, -5, 2**40])
    assert certified(torch.addcmul, numbers, numbers.flip(0), numbers + 1, value=3).label is Label.S
