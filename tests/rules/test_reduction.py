"""Reductions erase what counting says."""

import pytest
import torch
from torch import nn

from bwsk_fx.verdict import Label

X = torch.randn(2, 5, 4)
IMAGE = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("name", ["sum", "mean", "amax", "logsumexp", "prod", "var"])
def test_reducing_a_dimension_erases_all_but_one(verdict_of, name):
    verdict = verdict_of(lambda x: getattr(x, name)(1), X)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 16)


def test_a_dimension_of_one_element_is_not_merged(verdict_of):
    assert verdict_of(lambda x: x.sum(1), X[:, :1]).label is Label.S
    assert torch.equal(X[:, :1].sum(1)[:, None], X[:, :1])
    assert verdict_of(lambda x: x.norm(dim=1), X[:, :1]).label is Label.K


def test_reducing_the_batch_leaves_nothing_of_a_sample(verdict_of):
    assert verdict_of(lambda x: x.mean(), X).erasure.elements == 20
    assert verdict_of(lambda x: x.mean(0), X).erasure.elements == 20


def test_maximum_of_two_operands_has_no_known_amount(verdict_of):
    verdict = verdict_of(lambda x, y: torch.maximum(x, y), X, X + 1)
    assert (verdict.label, verdict.erasure) == (Label.K, None)


def test_pooling(verdict_of):
    assert verdict_of(nn.MaxPool2d(2), IMAGE).erasure.elements == 3 * (36 - 9)
    assert verdict_of(nn.AdaptiveAvgPool2d(1), IMAGE).erasure.elements == 3 * 35
    overlapping = verdict_of(nn.MaxPool2d(3, stride=1, padding=1), IMAGE)
    assert (overlapping.label, overlapping.erasure) == (Label.K, None)


def test_running_sums_are_undone_by_differences(verdict_of):
    assert verdict_of(lambda x: x.cumsum(1), X).label is Label.S
    torch.testing.assert_close(X.cumsum(1).diff(dim=1, prepend=torch.zeros(2, 1, 4)), X)
    assert verdict_of(lambda x: x.cummax(1)[0], X).label is Label.K
