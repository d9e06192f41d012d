"""Comparisons leave a bit, and masks choose."""

import operator

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.randn(3, 4)
MASK = torch.tensor([True, False, True, True])
ALL, NONE = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize("function", [operator.gt, torch.lt, torch.ge, torch.Tensor.le, torch.eq, torch.not_equal])
def test_comparisons_leave_one_bit(certified, function):
    for other in (0, X.flip(0)):
        verdict = certified(function, X, other)
        assert (verdict.label, verdict.erasure.bits) == (Label.K, 12 * 31)


@pytest.mark.parametrize("function", [torch.isnan, torch.isfinite, torch.isinf, torch.isposinf, torch.isreal])
def test_predicates_leave_one_bit(certified, function):
    assert certified(function, X).erasure.bits == 12 * 31


def test_masks_that_are_compared_with_a_truth_value(certified):
    for other in (True, False, 0, 1):
        assert certified(torch.eq, MASK, other).label is Label.S
        assert certified(operator.ne, MASK, other).label is Label.S
    assert certified(torch.eq, MASK, 2).label is Label.K


def test_choices_by_dynamic_masks_are_k(certified):
    assert certified(torch.where, MASK, X, X.flip(0)).label is Label.K
    assert certified(torch.masked_fill, X, MASK, 0.0).label is Label.K
    assert certified(torch.where, X > 0, X, 0.0).label is Label.K


def test_static_masks_are_counted(certified):
    only = {id(X)}
    assert certified(torch.where, MASK, X, 0.0, dynamic=only).erasure.elements == 3
    assert certified(torch.where, MASK, 0.0, X, dynamic=only).erasure.elements == 9
    assert certified(torch.masked_fill, X, MASK, 0.0, dynamic=only).erasure.elements == 9
    assert certified(torch.Tensor.where, X, MASK, X * 0, dynamic=only).erasure.elements == 3
    assert certified(torch.Tensor.masked_fill_, X, MASK, 0.0, dynamic=only).erasure.elements == 9


def test_masks_that_decide_nothing_are_s(certified):
    only = {id(X)}
    assert certified(torch.where, ALL, X, 0.0, dynamic=only).label is Label.S
    assert certified(torch.where, NONE, 0.0, X, dynamic=only).label is Label.S
    assert certified(torch.masked_fill, X, NONE, 0.0, dynamic=only).label is Label.S


def test_one_copy_that_a_mask_keeps_is_enough(certified):
    column, mask = X[:, :1], torch.tensor([[True] * 3 + [False], [False] * 4, [True] * 4])
    assert certified(torch.masked_fill, column, mask[::2][[0, 0, 0]], 0.0, dynamic={id(column)}).label is Label.S
    verdict = certified(torch.masked_fill, column, mask, 0.0, dynamic={id(column)})
    assert verdict.erasure.elements == 1
    assert certified(torch.where, mask, column, 0.0, dynamic={id(column)}).erasure.elements == 1


def test_the_indices_of_a_mask_are_the_mask(certified):
    assert certified(torch.where, MASK).label is Label.S
    assert certified(torch.where, X).label is Label.K


def test_masks_in_captured_graphs(verdict_of):
    batch = torch.randn(2, 4, 4)
    verdict = verdict_of(lambda weight, x: x.masked_fill(torch.ones(4, 4, dtype=torch.bool).tril(), 0.0), batch)
    assert (verdict.label, verdict.erasure) == (Label.K, None)
    assert verdict_of(lambda x: x.masked_fill(x > 0, 0.0), batch).label is Label.K
    assert verdict_of(lambda x, y: torch.where(x > 0, x, y), batch, batch).label is Label.K
