"""Linear maps are S unless they contract; inverses are run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
TALL, WIDE = torch.randn(2, 7, 4), torch.randn(2, 4, 7)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _trip(*call):
    executed = execute(call[0], call[1:], {})
    verdict = sound.verdict(executed.call)
    assert verdict.label is Label.S
    return round_trip(executed, verdict)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [4, 9])
def test_square_and_expanding_maps_are_undone_by_the_pseudo_inverse(certified, out, bias):
    verdict = certified(nn.Linear(4, out, bias=bias).double(), X.double())
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, WitnessKind.NOTHING, 0.8)
    assert "full rank" in verdict.rationale
    assert "full rank" in verdict.domain


def test_contracting_maps_erase_the_difference_for_every_vector(verdict_of):
    verdict = verdict_of(nn.Linear(4, 1), X)
    assert (verdict.label, verdict.confidence) == (Label.K, 0.8)
    assert verdict.erasure.elements == 3 * (4 - 1)
    assert "erases 3 of 4 dimensions" in verdict.rationale


def test_linear_as_a_function(verdict_of):
    assert verdict_of(lambda weight, x: F.linear(x, weight), X).label is Label.S
    assert verdict_of(lambda weight, x: F.linear(x, weight[:2]), X).erasure.elements == 6
    assert verdict_of(lambda weight, x: F.linear(x, weight[0]), X).erasure.elements == 3 * 3


def test_a_dynamic_weight_is_a_witness(certified):
    verdict = certified(F.linear, X[0], torch.randn(5, 4))
    assert (verdict.label, verdict.witness.names) == (Label.S, ("operand_1",))
    # Six vectors determine a weight, and are preferred to a square matrix.
    assert certified(F.linear, X, torch.randn(4, 4)).witness.names == ("operand_0",)
    # Two vectors do not determine a weight, and three outputs not four inputs.
    assert certified(F.linear, X[0, :2], torch.randn(3, 4)).erasure.elements == 2


def test_a_dynamic_bias_is_rebuilt(certified):
    verdict = certified(F.linear, X, torch.randn(2, 4), torch.randn(2))
    assert (verdict.label, verdict.undo.operands) == (Label.S, (2,))
    assert verdict.witness.names == ("operand_0", "operand_1")


def test_a_weight_of_deficient_rank_loses_elements_and_rebuilds_none_wrongly():
    linear = nn.Linear(4, 4).double()
    linear.weight.data[:, 1] = linear.weight.data[:, 0]
    trip = _trip(linear, X.double())
    assert (trip.wrong, trip.lost > 0) == (0, True)
    assert trip.condition > 1e12
    linear.weight.data.zero_()
    assert _trip(linear, X.double()).wrong == 0


def test_the_condition_number_is_that_of_the_weight():
    linear = nn.Linear(3, 3).double()
    linear.weight.data = torch.diag(torch.tensor([8.0, 2.0, 1.0], dtype=torch.double))
    assert _trip(linear, X[..., :3].double()).condition == pytest.approx(8.0)


def test_conv1d_of_transformers_is_a_linear_map(certified, verdict_of):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(8, 4)
    layer.weight.data.normal_()
    assert certified(layer, X).label is Label.S
    assert verdict_of(Conv1D(2, 4), X).erasure.elements == 6


def test_product_with_a_static_matrix(verdict_of):
    assert verdict_of(lambda weight, x: x @ weight, X).label is Label.S
    assert verdict_of(lambda weight, x: torch.matmul(weight[:3], x), WIDE).erasure.elements == 7
    assert verdict_of(lambda weight, x: torch.addmm(weight[0], x, weight), torch.randn(2, 4)).label is Label.S


def test_product_of_activations_is_solved_with_the_longer_factor(verdict_of, certified):
    verdict = verdict_of(lambda x, y: x @ y, TALL, WIDE)
    assert verdict.label is Label.S
    assert (verdict.witness.kind, verdict.witness.names) == (WitnessKind.OTHER_OPERAND, ("y",))
    assert (verdict.witness.elements, verdict.witness.bytes) == (28, 112)
    assert certified(torch.matmul, TALL, WIDE).undo.operands == (0,)
    assert certified(torch.matmul, WIDE[:, :3], WIDE.mT).label is Label.K


def test_a_batch_of_matrices_is_more_equations_for_a_single_one(certified):
    one, several = torch.randn(3, 4), torch.randn(3, 4, 2)
    assert certified(torch.matmul, one, several[0]).erasure.elements == 3 * 2
    assert certified(torch.matmul, one, several, dynamic={id(one)}).label is Label.S


def test_a_square_matrix_of_activations_is_a_witness(certified):
    verdict = certified(torch.matmul, torch.randn(2, 7, 7), TALL)
    assert (verdict.label, verdict.witness.names) == (Label.S, ("operand_0",))
    assert verdict.undo.operands == (1,)


@pytest.mark.parametrize("dropout", [False, True])
def test_probabilities_times_values_erase(verdict_of, dropout):
    def attend(scores, values):
        probabilities = scores.softmax(-1)
        return F.dropout(probabilities, 0.1) @ values if dropout else probabilities @ values

    verdict = verdict_of(attend, torch.rand(2, 7, 7), TALL)
    assert verdict.label is Label.K
    assert verdict.erasure.elements == 7 * (7 - 4)
    # With more features than tokens, the values determine the probabilities.
    assert verdict_of(attend, torch.rand(2, 3, 3), torch.randn(2, 3, 5)).label is Label.S


def test_a_product_with_itself_loses_the_sign(certified):
    square = torch.rand(2, 4, 4)
    verdict = certified(torch.matmul, square, square)
    assert (verdict.label, verdict.erasure.bits) == (Label.K, 1)


def test_products_with_vectors(certified):
    matrix, vector = torch.randn(6, 4), torch.randn(4)
    assert certified(torch.mv, matrix, vector).undo.operands == (1,)
    assert certified(torch.mv, matrix, vector, dynamic={id(matrix)}).erasure.elements == 6 * 3
    assert certified(torch.matmul, matrix[:3], vector, dynamic={id(vector)}).erasure.elements == 1


def test_the_reflected_product_has_its_factors_the_other_way_round(certified):
    matrix, expanding = torch.randn(3, 4), torch.randn(4, 6)
    assert certified(torch.Tensor.__rmatmul__, expanding, matrix).undo.operands == (1,)
    assert certified("__rmatmul__", expanding, matrix, dynamic={id(expanding)}).erasure.elements == 6
    # The amount is about the first operand, though it is the second factor.
    assert certified(torch.Tensor.__rmatmul__, torch.randn(4), matrix).erasure.elements == 1


def test_products_of_whole_numbers_are_gray(certified):
    square = torch.randint(0, 5, (4, 4))
    assert certified(torch.matmul, square, square.clone()).label is Label.GRAY
    assert certified(torch.matmul, square[:3], square[:, :3].clone()).label is Label.K


def test_aten_operators_have_the_rules_of_their_functions(certified):
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert certified(torch.ops.aten.bmm.default, a, b).label is Label.S
    assert certified(torch.ops.aten.mm.default, a[0], b[0, :, :2]).label is Label.K
