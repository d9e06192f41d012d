"""Selection is judged by what is never picked."""

import operator

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.randn(2, 5, 4)


def test_the_first_token_erases_all_others(verdict_of):
    verdict = verdict_of(lambda x: x[:, 0], X)
    assert (verdict.label, verdict.confidence, verdict.erasure.elements) == (Label.K, 0.8, 4 * 4)
    assert verdict_of(lambda x: x.select(1, 0), X).erasure.elements == 16
    assert verdict_of(lambda x: x.narrow(1, 0, 3), X).erasure.elements == 8
    assert verdict_of(lambda x: x[..., 1:], X).erasure.elements == 5


def test_an_index_that_keeps_everything_is_s(verdict_of):
    for function in (lambda x: x[:, None], lambda x: x[:, :5], lambda x: x[..., 0:4]):
        assert verdict_of(function, X).label is Label.S


def test_dropping_samples_is_not_proportional_to_the_batch(verdict_of):
    # One sample is kept of any batch: per sample everything goes.
    assert verdict_of(lambda x: x[0], X).erasure.elements == 20


FEW, MANY, TWICE = torch.tensor([0, 1]), torch.tensor([4, 1, 2, 3, 0, 4]), torch.tensor([0, 0, 1, 2, 3])


def test_static_indices_are_looked_at(verdict_of):
    assert verdict_of(lambda x: x[:, FEW], X).erasure.elements == 12
    assert verdict_of(lambda x: x[:, MANY], X).label is Label.S
    assert verdict_of(lambda x: x[:, TWICE], X).erasure.elements == 4
    assert verdict_of(lambda x: x.index_select(1, FEW), X).erasure.elements == 12
    assert verdict_of(lambda x: x.index_select(1, MANY), X).label is Label.S
    # Which samples an index picks says nothing about other batches.
    assert verdict_of(lambda x: x[torch.tensor([1, 0])], X).label is not Label.S


STATIC = {
    "getitem": (operator.getitem, X, (slice(None), MANY), 0),
    "list": (operator.getitem, X, (slice(None), [0, 1, 4]), 16),
    "number": (operator.getitem, X, (Ellipsis, 1), 30),
    "step": (operator.getitem, X, (slice(None), slice(None, None, 2)), 16),
    "mask": (operator.getitem, X, torch.ones(2, 5, dtype=torch.bool), 0),
    "select": (torch.select, X, 1, 0, 32),
    "slice": (torch.ops.aten.slice.Tensor, X, 1, 0, 9, 0),
    "diagonal": (torch.diagonal, X, 0, 1, 2, 32),
    "diag of a vector": (torch.diag, X[0, 0], 0),
    "diag of a matrix": (torch.diag, X[0], 16),
    "index_select": (torch.index_select, X, 1, TWICE, 8),
    "gather": (torch.gather, X[0], 0, TWICE[:, None].expand(5, 4), 4),
    "gather all": (torch.gather, X[0], 0, MANY[:, None].expand(6, 4), 0),
    "take": (torch.take, X[0], torch.arange(20).flip(0), 0),
    "take_along_dim": (torch.take_along_dim, X[0], MANY[:, None], 0, 0),
    "masked_select": (torch.masked_select, X, torch.arange(4) > 0, 10),
    "aten.index": (torch.ops.aten.index.Tensor, X, [None, MANY], 0),
    "masked index": (torch.ops.aten._unsafe_masked_index.default, X[0, :, 0], MANY > 0, [MANY], 0.0, 1),
}


@pytest.mark.parametrize("name", STATIC)
def test_what_static_indices_never_pick(certified, name):
    target, operand, *rest, missing = STATIC[name]
    verdict = certified(target, operand, *rest, dynamic={id(operand)})
    if missing == 0:
        assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    else:
        assert (verdict.label, verdict.erasure.elements) == (Label.K, missing)


def test_dynamic_indices_prove_no_more_than_counting(certified):
    assert certified(torch.index_select, X, 1, MANY).label is Label.GRAY
    assert certified(torch.index_select, X, 1, FEW).erasure.elements == 24
    assert certified(torch.take, X, torch.arange(40)).label is Label.GRAY
    assert certified(torch.masked_select, X, X > 9).erasure.elements == 40
    assert certified(operator.getitem, X, X < 9).label is Label.K


def test_large_operands_are_judged_by_their_index(certified):
    large = torch.arange(16.0 * 1000).view(16, 1000)
    order = torch.arange(1000).flip(0)
    for call in ((operator.getitem, large, (slice(None), order)), (torch.index_select, large, 1, order)):
        assert certified(*call, dynamic={id(large)}).label is Label.S
    verdict = certified(torch.ops.aten.index.Tensor, large, [None, order[:-1]], dynamic={id(large)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 16)


def test_static_tables_that_are_indexed(certified):
    table, ids = torch.arange(12.0).view(4, 3), torch.tensor([3, 0, 3])
    assert certified(operator.getitem, table, ids, dynamic={id(ids)}).label is Label.S
    assert certified(torch.index_select, table, 0, ids, dynamic={id(ids)}).label is Label.S
    assert certified(torch.ops.aten.index.Tensor, table, [ids], dynamic={id(ids)}).label is Label.S
    columns = ids % 3
    assert certified(torch.index_select, table, 1, columns, dynamic={id(columns)}).label is Label.GRAY
    assert certified(torch.take, table, ids, dynamic={id(ids)}).label is Label.GRAY


def test_indices_that_count_every_dimension_keep_everything(verdict_of):
    def grid(x):
        rows, columns = torch.arange(x.shape[0]), torch.arange(5)
        return x[rows[:, None, None], (columns + 0).unsqueeze(0)]

    mask = torch.rand(3, 5) > 0.5
    assert verdict_of(grid, mask).label is Label.S
    # Both along one axis pick a diagonal; fewer columns, or columns from 1, leave some out.
    assert verdict_of(lambda x: x[torch.arange(5), torch.arange(5)], mask.new_ones(5, 5)).label is not Label.S
    for columns in (lambda: torch.arange(4), lambda: torch.arange(5) // 2, lambda: torch.arange(1, 6) - 1):
        verdict = verdict_of(lambda x, c=columns: x[torch.arange(x.shape[0])[:, None], c()], mask)
        assert verdict.label is not Label.S
