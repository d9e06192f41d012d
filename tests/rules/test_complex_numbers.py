"""Parts of complex numbers, and what is put together from two."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

X = torch.tensor([[0.5, -2.0, 3.0], [-0.25, 4.0, -1.0]])
Y = torch.tensor([[1.5, 0.5, -2.0], [-4.0, 2.0, 0.5]])
Z = torch.complex(X, Y)


@pytest.mark.parametrize("function", [torch.real, torch.imag, torch.angle])
def test_one_part_is_half_of_a_complex_number(certified, function):
    verdict = certified(function, Z)
    assert (verdict.label, verdict.confidence, verdict.erasure.elements) == (Label.K, 0.8, 3)


def test_real_numbers(certified):
    assert certified(torch.real, X).label is Label.S
    assert certified(torch.angle, X).label is Label.K


@pytest.mark.parametrize(
    "function", [torch.conj, torch.conj_physical, torch.resolve_conj, torch.resolve_neg, torch.Tensor.conj]
)
def test_conjugates_are_their_own_inverse(certified, function):
    assert certified(function, Z).label is Label.S
    assert certified(function, X).label is Label.S


def test_reinterpreted_memory(certified):
    assert certified(torch.view_as_real, Z).label is Label.S
    assert certified(torch.view_as_complex, torch.randn(3, 2)).label is Label.S


def test_two_parts_put_together_are_both_rebuilt(certified):
    verdict = certified(torch.complex, X, Y)
    assert (verdict.witness.kind, verdict.undo.operands) == (WitnessKind.NOTHING, (0, 1))
    assert certified(torch.complex, X[:1], Y).label is Label.S
    assert certified(torch.complex, X, Y, dynamic={id(Y)}).label is Label.S
    assert certified(torch.complex, X, X).label is Label.S


def test_polar_coordinates_give_the_size_back(certified):
    verdict = certified(torch.polar, X.abs(), Y)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.OTHER_OPERAND)
    assert certified(torch.polar, X, Y, dynamic={id(Y)}).label is Label.K
