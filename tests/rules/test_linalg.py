"""Factorizations multiply back; what one triangle, or one number, leaves out is lost."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

linalg, aten = torch.linalg, torch.ops.aten
SHAPES = [(4, 4), (2, 5, 3), (2, 3, 5)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _regular(size: int = 4, **options) -> torch.Tensor:
    return torch.randn(2, size, size, **options) + 3 * torch.eye(size, **options)


@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "function",
    [
        linalg.qr,
        torch.qr,
        torch.geqrf,
        linalg.svd,
        torch.svd,
        linalg.lu,
        linalg.lu_factor,
        linalg.lu_factor_ex,
        torch.lu,
        "lu",
        aten._linalg_svd.default,
        aten.linalg_qr.default,
    ],
)
def test_factorizations_multiply_back(certified, function, shape, dtype):
    verdict = certified(function, torch.randn(shape, dtype=dtype))
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_factorizations_in_their_other_forms(certified):
    matrix = torch.randn(5, 3)
    assert certified(linalg.qr, matrix, mode="complete").label is Label.S
    assert certified(linalg.svd, matrix, full_matrices=False).label is Label.S
    # Of fifteen elements, R has six.
    assert certified(linalg.qr, matrix, mode="r").erasure.elements == 9
    assert certified(torch.svd, matrix, compute_uv=False).erasure.elements == 12
    assert certified(linalg.svdvals, matrix).erasure.elements == 12


def test_eigenvectors_multiply_back_and_eigenvalues_do_not(certified):
    square = torch.randn(2, 4, 4, dtype=torch.double)
    assert certified(linalg.eig, square).label is Label.S
    assert certified(linalg.eigvals, square).erasure.elements == 2 * 12
    assert certified(linalg.eigvalsh, square).erasure.elements == 2 * 12


@pytest.mark.parametrize("function", [torch.cholesky_inverse, linalg.eigh, linalg.ldl_factor, linalg.ldl_factor_ex])
def test_functions_of_one_triangle_lose_the_other_one(certified, function):
    assert certified(function, _regular()).erasure.elements == 2 * 6


@pytest.mark.parametrize("function", [torch.cholesky, linalg.cholesky, linalg.cholesky_ex])
def test_the_operand_of_cholesky_need_not_be_symmetric(certified, function):
    square = _regular()
    assert certified(function, square @ square.mT).erasure.elements == 2 * 6
    matrix = square @ square.mT
    assert torch.equal(linalg.cholesky(matrix), linalg.cholesky(matrix.tril()))


def test_reflectors_are_read_below_the_diagonal(certified):
    packed, tau = torch.geqrf(torch.randn(5, 3))
    verdict = certified(linalg.householder_product, packed, tau)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 6)
    other = packed + torch.ones(5, 3).triu()
    torch.testing.assert_close(linalg.householder_product(packed, tau), linalg.householder_product(other, tau))


@pytest.mark.parametrize("function", [linalg.inv, torch.inverse, linalg.inv_ex, linalg.pinv, torch.pinverse])
def test_inverses_are_inverted_again(certified, function):
    verdict = certified(function, _regular(dtype=torch.double))
    assert verdict.label is Label.S
    assert verdict.domain


def test_pseudo_inverses_that_cut_singular_values_off_erase(certified):
    matrix = torch.randn(5, 3)
    assert certified(linalg.pinv, matrix).label is Label.S
    assert certified(linalg.pinv, matrix, rtol=1e-9).label is Label.S
    assert certified(linalg.pinv, matrix, rtol=0.1).label is Label.K
    assert certified(linalg.pinv, matrix, rtol=torch.tensor(0.1)).label is Label.K
    assert certified(linalg.pinv, _regular(), hermitian=True).erasure.elements == 2 * 6
    assert certified(linalg.pinv, torch.randn(5, 2) @ torch.randn(2, 4)).label is Label.S


def test_tensor_inverses(certified):
    assert certified(linalg.tensorinv, torch.randn(2, 3, 6), ind=2).label is Label.S
    assert certified(linalg.tensorinv, torch.randn(6, 2, 3), ind=1).label is Label.S


@pytest.mark.parametrize(("power", "label"), [(0, "K"), (1, "S"), (-1, "S"), (2, "K"), (3, "K"), (-2, "K")])
def test_matrix_powers(certified, power, label):
    assert certified(linalg.matrix_power, _regular(dtype=torch.double), power).label == label


def test_a_third_of_a_turn_has_the_power_of_the_identity():
    turn = torch.tensor(2 * torch.pi / 3)
    rotation = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    torch.testing.assert_close(linalg.matrix_power(rotation, 3), torch.eye(2), atol=1e-6, rtol=0)


def test_powers_and_exponentials_of_numbers_are_undone(certified):
    number = torch.randn(3, 1, 1)
    assert certified(linalg.matrix_power, number, 3).label is Label.S
    assert certified(linalg.matrix_power, number, -3).label is Label.S
    assert certified(linalg.matrix_power, number, 2).label is Label.K
    assert certified(torch.matrix_exp, number).label is Label.S
    assert certified(torch.matrix_exp, _regular()).label is Label.K


@pytest.mark.parametrize("function", [linalg.det, torch.logdet, linalg.slogdet, torch.trace])
def test_one_number_is_left_of_a_matrix(certified, function):
    square = _regular()
    square = square @ square.mT
    result = certified(function, square[0] if function is torch.trace else square)
    assert result.erasure.elements == (15 if function is torch.trace else 30)
    number = torch.rand(1, 1) + 1
    assert certified(function, number).label is Label.S


@pytest.mark.parametrize("function", [linalg.cond, linalg.matrix_rank, linalg.matrix_norm])
def test_measures_of_matrices(certified, function):
    assert certified(function, _regular()).erasure.elements == 2 * 15
    assert certified(function, torch.rand(1, 1)).erasure.bits == 1


def test_low_rank_factorizations_keep_what_they_are_asked_for(certified):
    matrix = torch.randn(6, 4)
    assert certified(torch.svd_lowrank, matrix, 4).label is Label.S
    assert certified(torch.svd_lowrank, matrix, 2).erasure.elements == 4 * 2
    assert certified(torch.pca_lowrank, matrix, 4).erasure.elements == 4
    assert certified(torch.pca_lowrank, matrix, 4, center=False).label is Label.S


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_factors_are_packed_again(certified, shape):
    packed, pivots = linalg.lu_factor(torch.randn(shape))
    assert certified(torch.lu_unpack, packed, pivots).label is Label.S
    assert certified(torch.lu_unpack, packed, pivots, unpack_data=False).erasure.elements == packed.numel()


def test_determinants_of_aten_keep_their_factors(certified):
    for matrix in (_regular(), _regular().mT, _regular(dtype=torch.cdouble)):
        assert certified(aten._linalg_det.default, matrix).label is Label.S
        assert certified(aten._linalg_slogdet.default, matrix).label is Label.S
