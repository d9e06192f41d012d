"""Sums, products and quotients: what they need to be undone, and what zeros, masks and integers erase."""

import math
import operator

import pytest
import torch

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

X = torch.tensor([[0.5, -2.0, 3.0, 1.5], [-0.25, 4.0, -1.0, 0.75], [2.5, -3.5, 1.25, -0.5]])
Y = torch.tensor([[1.5, 0.5, -2.0, 3.0], [-4.0, 2.0, 0.5, -1.5], [0.25, 1.0, -0.75, 2.0]])
BATCH = torch.randn(2, 3, 4)
INTEGERS = torch.tensor([-128, -77, -3, -1, 0, 1, 2, 5, 64, 127], dtype=torch.int8)
MASK = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("function", [operator.add, operator.sub, torch.rsub, torch.Tensor.__rsub__, torch.Tensor.add_])
def test_a_residual_is_undone_by_its_other_operand(certified, function):
    verdict = certified(function, X, Y)
    assert (verdict.label, verdict.witness.kind, verdict.witness.elements) == (Label.S, WitnessKind.OTHER_OPERAND, 12)
    assert verdict.domain == "the other summand does not absorb it"
    assert certified(function, X, Y, dynamic={id(X)}).witness.kind is WitnessKind.NOTHING
    assert certified(function, X, Y, dynamic={id(Y)}).witness.kind is WitnessKind.NOTHING


def test_a_residual_in_a_captured_graph_names_the_other_branch(verdict_of):
    verdict = verdict_of(lambda x, y: x + y, BATCH, BATCH + 1)
    assert (verdict.label, verdict.confidence, verdict.witness.names) == (Label.S, 0.5, ("y",))
    assert (verdict.witness.elements, verdict.witness.bytes) == (12, 48)
    for function in (lambda weight, x: x + weight[0], lambda x: x + 1, lambda x: 1 - x, lambda x: x.add(1)):
        assert verdict_of(function, BATCH).witness.kind is WitnessKind.NOTHING


def test_alpha_weighs_the_second_operand(certified):
    assert certified(torch.add, X, Y, alpha=3).label is Label.S
    assert certified(torch.add, X, Y, dynamic={id(Y)}, alpha=3).label is Label.S
    assert certified(torch.rsub, X, Y, alpha=2).label is Label.S
    assert certified(torch.ops.aten.add.Scalar, X, 2.0, 3.0).label is Label.S
    assert certified(torch.add, X, Y, dynamic={id(Y)}, alpha=0).erasure.elements == 12
    assert certified(torch.sub, INTEGERS, INTEGERS.flip(0), alpha=3).label is Label.S
    assert certified(torch.rsub, INTEGERS, INTEGERS.flip(0), alpha=6).erasure.bits == 10


def test_broadcast_operands_are_rebuilt_from_their_first_copy(certified):
    for function in (torch.add, torch.sub, torch.mul, torch.div):
        assert certified(function, X[:1], Y).label is Label.S
        assert certified(function, X[:, :1], Y[0]).label is Label.S
    assert certified(torch.add, X[0, :1], torch.ones(0)).erasure.elements == 1


def test_infinite_summands_absorb(certified):
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    verdict = certified(torch.add, X, bias, dynamic={id(X)})
    assert (verdict.label, verdict.confidence, verdict.erasure.elements) == (Label.K, 0.8, 6)
    assert certified(torch.add, X, math.inf).erasure.elements == 12


def test_a_value_with_itself(certified):
    assert certified(torch.add, X, X).label is Label.S
    assert certified(torch.sub, X, X).erasure.elements == 12
    assert certified(torch.sub, X, X, alpha=3).label is Label.S
    assert certified(torch.mul, X, X).erasure.bits == 12
    assert certified(torch.div, X, X).erasure.elements == 12
    assert certified(torch.add, INTEGERS, INTEGERS).erasure.bits == 10
    assert certified(torch.mul, MASK, MASK).label is Label.S


def test_integers_wrap_around(certified):
    assert certified(torch.add, INTEGERS, INTEGERS.flip(0)).label is Label.S
    assert certified(torch.mul, INTEGERS, 77).label is Label.S
    assert certified(torch.mul, INTEGERS, -1).label is Label.S
    assert certified(torch.mul, INTEGERS, 12).erasure.bits == 20
    odd = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15, 127, -1], dtype=torch.int8)
    assert certified(torch.mul, INTEGERS, odd, dynamic={id(INTEGERS)}).label is Label.S
    assert certified(torch.mul, INTEGERS, odd).label is Label.GRAY
    even = odd * 2
    assert certified(torch.mul, INTEGERS, even, dynamic={id(INTEGERS)}).label is Label.K


def test_integers_that_become_floats(certified):
    assert certified(torch.add, INTEGERS, 0.5).label is Label.S
    assert certified(torch.mul, INTEGERS, 0.3).label is Label.S
    assert certified(torch.div, INTEGERS, 7).label is Label.S
    for function in (torch.add, torch.mul, torch.div):
        assert certified(function, INTEGERS.long(), 0.5).label is Label.K
    assert (torch.tensor([2**30]) * 0.5).equal(torch.tensor([2**30 + 1]) * 0.5)


def test_truth_values(certified):
    assert certified(torch.add, MASK, MASK.flip(0)).label is Label.K
    assert certified(torch.add, MASK, torch.arange(4)).label is Label.S
    assert certified(torch.add, MASK, 3).label is Label.S
    assert certified(torch.rsub, MASK.int(), 1).label is Label.S
    assert certified(torch.mul, MASK, 2).label is Label.S
    assert certified(torch.mul, MASK, 0.5).label is Label.S


@pytest.mark.parametrize("function", [lambda x: x * 3.0, lambda x: x / 3.0, lambda x: 3 * x, lambda x: x.mul(-0.1)])
def test_scaling_by_a_number(verdict_of, function):
    verdict = verdict_of(function, BATCH)
    assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.8, WitnessKind.NOTHING)


def test_numbers_without_an_inverse(certified):
    for function, number in ((torch.mul, 0), (torch.mul, math.inf), (torch.div, 0), (torch.div, math.inf)):
        assert certified(function, X, number).erasure.elements == 12
    assert certified(torch.Tensor.__rdiv__, X, 0).erasure.elements == 12


def test_products_and_quotients_of_two_values(certified):
    for function in (torch.mul, torch.div, operator.truediv, torch.Tensor.__rmul__, torch.Tensor.__rdiv__):
        verdict = certified(function, X, Y)
        assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.5, WitnessKind.OTHER_OPERAND)
        assert "zero" in verdict.domain
    assert certified(torch.div, X, Y, dynamic={id(Y)}).label is Label.S
    assert certified(torch.mul, X, X.to(torch.complex64) * 1j).label is Label.S


def test_static_factors_are_looked_at(certified):
    factor = torch.tensor([1.0, 0.0, -2.0, 0.0])
    for function in (torch.mul, torch.div):
        verdict = certified(function, X, factor, dynamic={id(X)})
        assert (verdict.label, verdict.confidence, verdict.erasure.elements) == (Label.K, 0.8, 6)
        assert certified(function, X, factor + 3, dynamic={id(X)}).label is Label.S
    assert certified(torch.div, factor, X, dynamic={id(X)}).erasure.elements == 6
    # Each element of a column has copies beside the zeros.
    column = X[:, :1]
    assert certified(torch.mul, column, factor, dynamic={id(column)}).label is Label.S


def test_static_factors_of_captured_graphs(verdict_of):
    assert verdict_of(lambda weight, x: x * weight[0], BATCH).label is Label.S
    assert verdict_of(lambda weight, x: x * weight, torch.randn(2, 4, 4)).label is Label.S
    assert verdict_of(lambda weight, x: x * (weight > 1.5), torch.randn(2, 4, 4)).label is Label.K


def test_numbers_that_are_computed_from_sizes(verdict_of):
    for function in (lambda x: x * x.shape[0], lambda x: x / x.shape[0], lambda x: x + x.size(0), lambda x: 2 / x):
        verdict = verdict_of(function, BATCH)
        assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_masks_erase_what_they_zero(certified):
    assert certified(torch.mul, X, MASK, dynamic={id(X)}).erasure.elements == 3
    assert certified(torch.mul, X, MASK).erasure is None
    everything = torch.ones(4, dtype=torch.bool)
    assert certified(torch.mul, X, everything, dynamic={id(X)}).label is Label.S
    assert certified(torch.mul, MASK, X).label is Label.K
    assert certified(torch.mul, X, torch.arange(4)).label is Label.GRAY


def test_divisions_that_round(certified):
    for mode in ("floor", "trunc"):
        assert certified(torch.div, X, 2, rounding_mode=mode).label is Label.K
    for function in (torch.floor_divide, operator.floordiv, torch.Tensor.__rfloordiv__):
        assert certified(function, X, 2).label is Label.K
    assert certified(torch.floor_divide, INTEGERS, 1).label is Label.S
    assert certified(torch.floor_divide, INTEGERS, 2).label is Label.K


def test_what_the_result_does_not_determine_is_lost_and_not_wrong():
    for function, other, lost in ((torch.add, 1e9, 12), (torch.mul, 0.0, 12), (torch.div, math.inf, 12)):
        operand = torch.full_like(X, other)
        executed = execute(function, (X, operand), {})
        trip = round_trip(executed, sound.verdict(executed.call))
        assert (trip.wrong, trip.lost) == (0, lost)
