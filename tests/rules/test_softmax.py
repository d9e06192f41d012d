"""Softmax and its relatives are undone by the logsumexp of each row."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

X = torch.linspace(-6, 6, 24).view(2, 3, 4)
FORMS = [
    (F.softmax, {"dim": -1}, 6),
    (F.log_softmax, {"dim": 1}, 8),
    (F.softmin, {"dim": 0}, 12),
    (torch.softmax, {"dim": 2}, 6),
    (torch.special.log_softmax, {"dim": 0}, 12),
    (nn.Softmax(-1), {}, 6),
    (nn.LogSoftmax(1), {}, 8),
    (nn.Softmin(2), {}, 6),
    (nn.Softmax2d(), {}, 12),
    (torch.ops.aten._safe_softmax.default, {"dim": 1}, 8),
]


@pytest.mark.parametrize(("softmax", "options", "rows"), FORMS)
def test_each_row_needs_its_logsumexp(certified, softmax, options, rows):
    verdict = certified(softmax, X, **options)
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (
        Label.S,
        WitnessKind.BY_PRODUCTS,
        ("logsumexp",),
    )
    assert (verdict.witness.elements, verdict.witness.bytes) == (rows, 4 * rows)


def test_the_dimension_that_torch_chooses_by_rank(certified):
    for operand, rows in ((X, 12), (X[0], 3), (X[0, 0], 1), (X[0, 0, 0], 1)):
        with pytest.warns(UserWarning, match="Implicit dimension"):
            assert certified(nn.Softmax(), operand).witness.elements == rows


def test_rows_are_counted_per_sample(verdict_of):
    assert verdict_of(lambda x: F.softmax(x, dim=-1), X).witness.elements == 3


def test_softmax_that_narrows_erases(verdict_of, certified):
    narrow = verdict_of(lambda x: F.softmax(x, dim=-1, dtype=torch.bfloat16), X)
    assert (narrow.label, narrow.erasure.bits) == (Label.K, 12 * 16)
    assert certified(F.softmax, X.bfloat16(), dim=-1, dtype=torch.float32).label is Label.S
    assert certified(F.softmax, torch.arange(4), dim=-1, dtype=torch.float32).label is Label.K


def test_masked_rows(certified):
    mask = torch.tensor([True, True, False, True])
    assert certified(torch.masked.softmax, X, -1).label is Label.S
    assert certified(torch.masked.softmax, X, -1, mask=mask, dynamic={id(X)}).label is Label.K


def test_the_gradient_loses_one_element_per_row(certified):
    result = X.softmax(-1)
    for operator in (torch.ops.aten._softmax_backward_data, torch.ops.aten._log_softmax_backward_data):
        verdict = certified(operator.default, X, result, -1, torch.float32)
        assert (verdict.label, verdict.erasure.elements) == (Label.K, 6)
