"""Values with indices are the operand; values alone have lost their order, and positions alone their values."""

import math

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.randn(2, 5, 4)
TIES = torch.tensor([2.0, 2.0, 1.0, 3.0, 3.0, 3.0, 1.0])


def test_values_and_indices_are_the_operand(certified, verdict_of):
    for options in ({}, {"dim": 1}, {"dim": 0, "descending": True}, {"stable": True, "dim": 1}):
        assert certified(torch.sort, X, **options).label is Label.S
    assert certified(torch.ops.aten.sort.stable, X, stable=True, dim=1).label is Label.S
    assert certified(torch.topk, X, 5, 1).label is Label.S
    assert verdict_of(lambda x: x.sort(-1)[0], X).label is Label.S


def test_the_order_goes_without_indices(certified):
    verdict = certified(torch.msort, X[0])
    assert verdict.label is Label.K
    assert verdict.erasure.bits == pytest.approx(4 * math.log2(math.factorial(5)))
    assert certified(torch.msort, X[:1]).label is Label.S


def test_rankings_erase(verdict_of, certified):
    assert verdict_of(lambda x: x.topk(1, -1)[0], X).erasure.elements == 15
    assert verdict_of(lambda x: x.argmax(-1), X).erasure.elements == 20
    for function in (torch.argsort, torch.argmin, torch.count_nonzero):
        assert certified(function, X).erasure.elements == 40
    assert certified(torch.bucketize, X, torch.tensor([0.0])).erasure.elements == 40
    assert certified(torch.histc, X).erasure.elements == 40
    assert certified(torch.isin, X, X[0]).erasure.elements == 40


def test_histograms_tell_the_smallest_and_the_largest_element(certified):
    assert certified(torch.histogram, X, 4).erasure.elements == 38
    assert certified(torch.histogram, X, 4, range=(0.0, 1.0)).erasure.elements == 40
    assert certified(torch.histogram, X, torch.linspace(0, 1, 4)).erasure.elements == 40
    assert certified(torch.histogramdd, X[0], [2, 2, 2, 2]).erasure.elements == 20 - 8
    assert certified(torch.histogramdd, X[0], [2, 2, 2, 2], range=[0.0, 1.0] * 4).erasure.elements == 20
    assert certified(torch.histogram, X[0, 0, :1], 4).label is Label.S
    assert certified(torch.histogram, X[0, 0, :2], 4).label is Label.GRAY
    assert certified(torch.bincount, torch.tensor([0, 2, 2])).erasure.elements == 3


def test_sums_of_weights_may_tell_them(certified):
    weights = torch.randn(3)
    assert certified(torch.bincount, torch.tensor([0, 1, 2]), weights, dynamic={id(weights)}).label is Label.GRAY


@pytest.mark.parametrize("function", [torch.equal, torch.allclose])
def test_answers_erase(certified, function):
    assert certified(function, X, X + 1).erasure.elements == 40


def test_positions_are_all_there_is_to_know_of_booleans(certified):
    assert certified(torch.nonzero, X).erasure.elements == 40
    for function in (torch.nonzero, torch.argwhere):
        assert certified(function, X > 0).label is Label.S
    assert certified(torch.nonzero, X > 0, as_tuple=True).label is Label.S
    assert certified(torch.nonzero_static, X > 0, size=3).label is Label.GRAY


@pytest.mark.parametrize("options", [{}, {"dim": 0}])
def test_distinct_values(certified, options):
    assert certified(torch.unique, TIES, **options).label is Label.K
    assert certified(torch.unique, TIES, return_inverse=True, **options).label is Label.S
    assert certified(torch.unique_consecutive, TIES, **options).label is Label.K
    assert certified(torch.unique_consecutive, TIES, return_counts=True, **options).label is Label.S
    assert certified(torch.unique_consecutive, TIES, return_inverse=True, **options).label is Label.S


def test_one_element_is_distinct(certified):
    assert certified(torch.unique, TIES[:1]).label is Label.S


def test_a_number_is_its_element(certified):
    assert certified("item", X[0, 0, 0]).label is Label.S


def test_zeros_that_are_left_out_are_put_back(certified):
    assert certified("to_sparse", X * (X > 0)).label is Label.S
