"""Factories take a shape; ranges hold their ends."""

import pytest
import torch

from bwsk_fx.verdict import Label

X = torch.randn(2, 3)


@pytest.mark.parametrize("call", [(torch.zeros_like, X), (torch.full_like, X, 2.0), ("new_zeros", X, (4,))])
def test_only_the_shape_is_used(certified, call):
    verdict = certified(*call)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 6)


@pytest.mark.parametrize("function", [torch.linspace, torch.logspace])
def test_ranges_hold_their_ends(certified, function):
    start, end = torch.tensor(1.5), torch.tensor(2.5)
    assert certified(function, start, end, 4).label is Label.S
    assert certified(function, start, end, 4, dynamic={id(end)}).label is Label.S
    assert certified(function, start, end, 1, dynamic={id(end)}).erasure.elements == 1
    assert certified(function, start, end, 0).label is Label.K
    assert certified(function, start, end, 4, dtype=torch.int64).label is Label.K
