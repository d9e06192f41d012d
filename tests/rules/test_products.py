"""Products with a summand, of vectors, and over named dimensions: what is solved for, and what is lost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

A, B = torch.randn(3, 4), torch.randn(4, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SUMMED = {
    torch.addmm: ((3, 5), (3, 4), (4, 5)),
    torch.addmv: ((5,), (5, 4), (4,)),
    torch.addbmm: ((3, 5), (2, 3, 4), (2, 4, 5)),
    torch.baddbmm: ((2, 3, 5), (2, 3, 4), (2, 4, 5)),
    torch.addr: ((3, 5), (3,), (5,)),
}


@pytest.mark.parametrize("function", SUMMED)
def test_the_summand_is_rebuilt_with_both_factors(certified, function):
    tensors = [torch.randn(shape) for shape in SUMMED[function]]
    verdict = certified(function, *tensors, beta=0.5, alpha=-2.0)
    assert (verdict.label, verdict.undo.operands) == (Label.S, (0,))
    assert verdict.witness.names == ("operand_1", "operand_2")


def test_a_summand_that_was_broadcast_is_rebuilt(certified):
    assert certified(torch.addmm, torch.randn(5), A, B).label is Label.S
    assert certified(torch.ops.aten.addmm.default, torch.randn(3, 1), A, B).label is Label.S


@pytest.mark.parametrize(
    ("function", "side", "label"),
    [
        (torch.addmm, 1, Label.S),
        (torch.addmm, 2, Label.K),
        (torch.addmv, 2, Label.S),
        (torch.addmv, 1, Label.K),
        (torch.addbmm, 1, Label.K),
        (torch.baddbmm, 1, Label.S),
        (torch.addr, 1, Label.S),
        (torch.addr, 2, Label.S),
    ],
)
def test_a_factor_is_rebuilt_where_the_summand_is_static(certified, function, side, label):
    tensors = [torch.randn(shape) for shape in SUMMED[function]]
    verdict = certified(function, *tensors, dynamic={id(tensors[side])}, alpha=3.0)
    assert verdict.label is label


def test_factors_of_zero_erase_everything(certified):
    tensors = [torch.randn(shape) for shape in SUMMED[torch.addmm]]
    assert certified(torch.addmm, *tensors, dynamic={id(tensors[1])}, alpha=0).erasure.elements == 12
    assert certified(torch.addmm, *tensors, dynamic={id(tensors[0])}, beta=0).erasure.elements == 15
    assert certified(torch.addmm, *tensors, beta=0).undo.operands == (1,)


def test_products_of_vectors(certified):
    x, y = torch.randn(5), torch.randn(5)
    assert certified(torch.dot, x, y).erasure.elements == 4
    assert certified(torch.dot, x, x).label is Label.K
    assert certified(torch.dot, x[:1], y[:1].clone()).label is Label.S
    assert certified(torch.outer, x, y[:3].clone()).label is Label.S
    assert certified(torch.vdot, x[:1] + 1j, y[:1] - 2j).label is Label.S


def test_outer_and_kronecker_products_determine_either_factor(certified):
    for side in (0, 1):
        factors = (torch.randn(2, 3), torch.randn(4, 1, 2))
        verdict = certified(torch.kron, *factors, dynamic={id(factors[side])})
        assert (verdict.label, verdict.domain) == (Label.S, "the factor at hand has full rank")


def test_inner_products_along_the_last_dimension(certified):
    assert certified(torch.inner, A, torch.randn(6, 4)).undo.operands == (0,)
    assert certified(torch.inner, A, torch.randn(2, 4)).erasure.elements == 3 * 2
    assert certified(torch.inner, A, torch.tensor(2.0)).label is Label.S


def test_vecdot_conjugates_its_first_operand(certified):
    x, y = torch.randn(3, 1, dtype=torch.cfloat), torch.randn(3, 1, dtype=torch.cfloat)
    for side in (x, y):
        assert certified(torch.linalg.vecdot, x, y, dynamic={id(side)}).label is Label.S
    assert certified(torch.linalg.vecdot, A, A + 1).erasure.elements == 3 * 3
    shared = torch.randn(4)
    # Five vectors that meet the same one determine it.
    assert certified(torch.linalg.vecdot, shared, torch.randn(5, 4), dynamic={id(shared)}).label is Label.S


def test_tensordot_sums_over_given_dimensions(certified):
    a, b = torch.randn(2, 3, 4), torch.randn(4, 3, 5, 3)
    assert certified(torch.tensordot, a, b, dims=([1, 2], [1, 0])).undo.operands == (0,)
    assert certified(torch.tensordot, a, torch.randn(3, 4, 5), dims=2).erasure.elements == 2 * (12 - 5)


@pytest.mark.parametrize(
    ("equation", "label"),
    [
        ("bij,bjk->bik", Label.S),
        ("bij, bjk -> bki", Label.S),
        ("...ij,...jk", Label.S),
        ("bij,bjk->bij", Label.S),
        ("bii,bjk->bjk", Label.S),
        ("bij,bjk->ik", Label.K),
        ("bij,bjk->b", Label.K),
    ],
)
def test_einsum_of_two_factors(certified, equation, label):
    assert certified(torch.einsum, equation, torch.randn(2, 4, 4), torch.randn(2, 4, 6)).label is label


def test_bilinear_maps(certified):
    layer = nn.Bilinear(4, 3, 6)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    assert certified(layer, x, y).undo.operands == (0,)
    assert certified(layer, x, y, dynamic={id(y)}).undo.operands == (0,)
    assert certified(nn.Bilinear(4, 3, 2), x, y).erasure.elements == 5 * 2
    assert certified(nn.Bilinear(4, 3, 3), x, y).undo.operands == (1,)
    weight, bias = torch.randn(6, 4, 3), torch.randn(6)
    assert certified(F.bilinear, x, y, weight, bias).undo.operands == (3,)


def test_cross_products_lose_the_parallel_component(certified):
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    assert certified(torch.linalg.cross, x, y).erasure.elements == 5
    assert certified(torch.cross, x, x, dim=-1).erasure.elements == 15
    shared = torch.randn(1, 3)
    assert certified(torch.linalg.cross, shared, y, dynamic={id(shared)}).label is Label.S
    assert certified(torch.linalg.cross, y, shared, dynamic={id(shared)}).label is Label.S


def test_the_powers_of_a_vandermonde_matrix_hold_the_operand(certified):
    x = torch.randn(2, 3)
    assert certified(torch.linalg.vander, x).label is Label.S
    assert certified(torch.vander, x[0]).label is Label.S
    assert certified(torch.vander, x[0], 2, True).label is Label.S
    assert certified(torch.vander, x[0], 1).erasure.elements == 3


def test_eight_bit_products_are_solved_in_a_wider_dtype(certified):
    one = torch.tensor(1.0)
    a, b = torch.randn(16, 16).to(torch.float8_e4m3fn), torch.randn(32, 16).to(torch.float8_e4m3fn).mT
    verdict = certified(torch._scaled_mm, a, b, one, one + 1, out_dtype=torch.bfloat16)
    assert (verdict.label, verdict.undo.operands) == (Label.S, (0,))
    assert certified(torch._scaled_mm, a, b, one, one).label is Label.K
    contracting = certified(torch._scaled_mm, b.mT.contiguous(), a.mT.contiguous().mT, one, one, out_dtype=torch.float)
    assert contracting.label is Label.S
