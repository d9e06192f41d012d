"""Selection is judged by counting, lookup and sorting by their inverses."""

import torch
from torch import nn

from bwsk_fx.verdict import Label, WitnessKind

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


def test_tensor_indices_prove_no_more_than_counting(verdict_of):
    few, many = torch.tensor([0, 1]), torch.tensor([0, 1, 2, 3, 4, 4])
    assert verdict_of(lambda x: x[:, few], X).erasure.elements == 12
    assert verdict_of(lambda x: x[:, many], X).label is Label.GRAY
    assert verdict_of(lambda x: x.index_select(1, few), X).erasure.elements == 12


def test_embedding_rows_tell_their_number(verdict_of):
    table, ids = nn.Embedding(7, 3), torch.tensor([[0, 3, 6], [2, 2, 5]])
    assert verdict_of(table, ids).label is Label.S
    assert torch.equal(torch.cdist(table(ids), table.weight).argmin(-1), ids)


def test_sorting_is_undone_by_its_indices(verdict_of):
    verdict = verdict_of(lambda x: x.sort(-1)[0], X)
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (
        Label.S,
        WitnessKind.BY_PRODUCTS,
        ("indices",),
    )
    assert (verdict.witness.elements, verdict.witness.bytes) == (20, 160)
    values, indices = X.sort(-1)
    assert torch.equal(torch.empty_like(X).scatter(-1, indices, values), X)


def test_rankings_erase(verdict_of):
    assert verdict_of(lambda x: x.topk(1, -1)[0], X).erasure.elements == 15
    assert verdict_of(lambda x: x.argmax(-1), X).erasure.elements == 20


def test_writes_erase(verdict_of):
    def write(x):
        y = x.clone()
        y[:, 0] = 0
        return y

    verdict = verdict_of(write, X)
    assert (verdict.label, verdict.rule) == (Label.K, "indexing.overwrite")
