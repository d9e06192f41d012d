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


SINGLE = torch.randn(3, 1, 2)


@pytest.mark.parametrize("name", ["sum", "mean", "prod", "amax", "amin", "logsumexp", "nansum", "nanmean", "median"])
def test_one_element_is_certified(certified, name):
    verdict = certified(name, SINGLE, 1)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    assert certified(name, X, 1).erasure.elements == 32


MERGES = {
    "aminmax": (torch.aminmax, X, {"dim": 1}, 40 - 16),
    "var_mean": (torch.var_mean, X, {"dim": 1}, 40 - 16),
    "kthvalue": (torch.kthvalue, X, {"k": 2, "dim": 1}, 32),
    "mode": (torch.mode, X, {"dim": 1}, 32),
    "max": (torch.max, X, {"dim": 1}, 32),
    "quantile": (torch.quantile, X, {"q": 0.5, "dim": 1}, 32),
    "std": (torch.std, X, {"dim": 1}, 32),
    "all": (torch.all, X, {"dim": 1}, 40),
    "sum_to_size": ("sum_to_size", X, {"size": (2, 1, 4)}, 32),
    "vector_norm": (torch.linalg.vector_norm, X, {"dim": 1}, 32),
    "segments": (torch.segment_reduce, X[0, 0], {"reduce": "sum", "lengths": torch.tensor([3, 1])}, 2),
    "variance of one": (torch.var, SINGLE, {"dim": 1, "correction": 0}, 6),
}


@pytest.mark.parametrize("name", MERGES)
def test_what_is_merged(certified, name):
    target, operand, options, missing = MERGES[name]
    verdict = certified(target, operand, dynamic={id(operand)}, **options)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, missing)


def test_bits_that_go_where_elements_stay(certified):
    assert certified(torch.linalg.vector_norm, SINGLE, dim=1).erasure.bits == 6
    assert certified(torch.linalg.vector_norm, SINGLE * 1j, dim=1).erasure.elements == 3
    assert certified(torch.aminmax, X[:, :2], dim=1).erasure.bits == 8
    assert certified(torch.aminmax, SINGLE, dim=1).label is Label.S
    assert certified(torch.std_mean, SINGLE, dim=1).label is Label.S
    assert certified(torch.quantile, SINGLE, torch.tensor([0.1, 0.5]), dim=1).label is Label.S


def test_truth_of_one_boolean_is_the_boolean(certified):
    assert certified(torch.any, SINGLE > 0, 1).label is Label.S
    assert certified(torch.any, (SINGLE > 0).byte(), 1).erasure.elements == 6


def test_dtypes_that_a_reduction_rounds_to(certified):
    assert certified(torch.mean, torch.ones(2, 1, dtype=torch.int64), 1, dtype=torch.float32).label is Label.K
    assert certified(torch.sum, torch.ones(2, 1, dtype=torch.int32), 1).label is Label.S
    assert certified(torch.logsumexp, SINGLE * 1j, 1).label is Label.K


def test_covariances_drop_means(certified):
    assert certified(torch.cov, X[0]).label is Label.K
    assert certified(torch.corrcoef, X[0]).label is Label.K


def test_segments_of_unknown_length(certified):
    lengths = torch.tensor([1, 1, 1, 1])
    assert certified(torch.segment_reduce, X[0, 0], "sum", lengths=lengths).label is Label.GRAY
    two = torch.tensor([2, 0, 1, 1])
    operand = X[0, 0].clone()
    assert certified(torch.segment_reduce, operand, "sum", lengths=two, dynamic={id(operand)}).label is Label.K
