"""Running sums are undone by differences, and differences by running sums from a known end."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 5, 4)


@pytest.mark.parametrize("operand", [X, X.half(), (X > 0), (X * 9).to(torch.int8), X[0, 0, 0]])
def test_running_sums(certified, operand):
    assert certified(torch.cumsum, operand, operand.dim() - 1).label is Label.S


def test_running_sums_in_another_dtype(certified):
    assert certified(torch.cumsum, X, 1, dtype=torch.int64).label is Label.K
    assert certified(torch.cumsum, X, 1, dtype=torch.float64).label is Label.S
    assert certified(torch.cumsum, (X * 9).to(torch.int32), 1, dtype=torch.int8).label is Label.K


def test_running_logsumexp(certified):
    assert certified(torch.logcumsumexp, X, 1).label is Label.S
    assert certified(torch.logcumsumexp, X * 1j, 1).label is Label.K


@pytest.mark.parametrize("function", [torch.cumprod, torch.cummax, torch.cummin])
def test_running_extremes_forget(certified, function):
    assert certified(function, X, 1).label is Label.K
    assert certified(function, X[:, :1], 1).label is Label.S


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_differences_from_a_known_end(certified, dtype):
    operand = (X * 9).to(dtype) if dtype is not torch.bool else X > 0
    two = operand[:, :2]
    assert certified(torch.diff, operand, dim=1).erasure.elements == 8
    for options in ({"prepend": two}, {"append": two}, {"prepend": two, "append": two[:, :1]}):
        for times in (0, 1, 2):
            verdict = certified(torch.diff, operand, times, 1, dynamic={id(operand)}, **options)
            assert verdict.label is Label.S
    assert certified(torch.diff, operand, 1, 1, prepend=two).witness.kind is WitnessKind.OTHER_OPERAND


def test_differences_between_known_ends(certified):
    one = X[:, :1]
    assert certified(torch.diff, X, 2, 1, prepend=one, append=one + 1, dynamic={id(X)}).label is Label.S
    assert certified(torch.diff, X, 3, 1, prepend=one, append=one).erasure.elements == 8


def test_areas_and_gradients(certified):
    assert certified(torch.trapezoid, X, dim=1).erasure.elements == 32
    assert certified(torch.cumulative_trapezoid, X, dim=1).erasure.elements == 8
    assert certified(torch.gradient, X).label is Label.K
