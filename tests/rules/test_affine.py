"""Linear maps are S unless they contract; inverses are run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
TALL, WIDE = torch.randn(2, 7, 4), torch.randn(2, 4, 7)


@pytest.mark.parametrize("out", [4, 9])
def test_square_and_expanding_maps_are_undone_by_the_pseudo_inverse(verdict_of, out):
    torch.manual_seed(0)
    linear = nn.Linear(4, out).double()
    verdict = verdict_of(linear, X.double())
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, WitnessKind.NOTHING, 0.8)
    assert "full rank" in verdict.rationale
    x = X.double()
    rebuilt = (linear(x) - linear.bias) @ torch.linalg.pinv(linear.weight).T
    torch.testing.assert_close(rebuilt, x)


def test_contracting_maps_erase_the_difference_for_every_vector(verdict_of):
    verdict = verdict_of(nn.Linear(4, 1), X)
    assert (verdict.label, verdict.confidence) == (Label.K, 0.8)
    assert verdict.erasure.elements == 3 * (4 - 1)
    assert "erases 3 of 4 dimensions" in verdict.rationale


def test_linear_as_a_function(verdict_of):
    assert verdict_of(lambda weight, x: F.linear(x, weight), X).label is Label.S
    assert verdict_of(lambda weight, x: F.linear(x, weight[:2]), X).erasure.elements == 6
    assert verdict_of(lambda x, y: F.linear(x, y), X, torch.randn(4, 4)).label is Label.GRAY


def test_conv1d_of_transformers_is_a_linear_map(verdict_of):
    from transformers.pytorch_utils import Conv1D

    assert verdict_of(Conv1D(8, 4), X).label is Label.S
    assert verdict_of(Conv1D(2, 4), X).erasure.elements == 6


def test_product_with_a_static_matrix(verdict_of):
    assert verdict_of(lambda weight, x: x @ weight, X).label is Label.S
    assert verdict_of(lambda weight, x: torch.matmul(weight[:3], x), WIDE).erasure.elements == 7
    assert verdict_of(lambda weight, x: torch.addmm(weight[0], x, weight), torch.randn(2, 4)).label is Label.S


def test_product_of_activations_is_solved_with_the_longer_factor(verdict_of):
    verdict = verdict_of(lambda x, y: x @ y, TALL, WIDE)
    assert verdict.label is Label.S
    assert (verdict.witness.kind, verdict.witness.names) == (WitnessKind.OTHER_OPERAND, ("y",))
    assert (verdict.witness.elements, verdict.witness.bytes) == (28, 112)
    a, b = TALL.double(), WIDE.double()
    torch.testing.assert_close((a @ b) @ torch.linalg.pinv(b), a)


def test_probabilities_times_values_erase(verdict_of):
    probabilities, values = torch.rand(2, 7, 7), TALL
    verdict = verdict_of(torch.matmul, probabilities, values)
    assert verdict.label is Label.K
    assert verdict.erasure.elements == 7 * (7 - 4)


def test_products_that_shapes_do_not_decide_are_gray(verdict_of):
    square = torch.rand(2, 4, 4)
    assert verdict_of(torch.matmul, square, square.clone()).label is Label.GRAY
    assert verdict_of(lambda x: x @ x, square).label is Label.GRAY
    assert verdict_of(lambda weight, x: x @ weight[0], X).label is Label.GRAY
