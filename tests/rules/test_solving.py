"""Solutions of systems: the right-hand side comes back, and the matrix where there are enough solutions."""

import pytest
import torch

from bwsk_fx.verdict import Erasure, Label

linalg = torch.linalg
A = torch.randn(2, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
B = torch.randn(2, 4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("function", [linalg.solve, linalg.solve_ex])
def test_right_hand_sides_are_rebuilt_with_the_matrix(certified, function):
    verdict = certified(function, A, B)
    assert (verdict.label, verdict.undo.operands, verdict.witness.names) == (Label.S, (1,), ("operand_0",))
    assert certified(function, A, B.mT, left=False).undo.operands == (1,)
    assert certified(function, A, B[..., 0].clone()).undo.operands == (1,)
    assert certified(function, A, B[0].clone()).undo.operands == (1,)


def test_the_matrix_needs_as_many_solutions_as_rows(certified):
    only = {"dynamic": {id(A)}}
    assert certified(linalg.solve, A, B, **only).erasure.elements == 2 * 4 * (4 - 3)
    assert certified(linalg.solve, A, B[..., 0].clone(), **only).erasure.elements == 2 * 4 * 3
    assert certified(linalg.solve, A, torch.randn(2, 4, 5, dtype=torch.double), **only).label is Label.S
    assert certified(linalg.solve, A, torch.randn(2, 5, 4, dtype=torch.double), left=False, **only).label is Label.S


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_triangular_systems(certified, upper, unit):
    options = {"upper": upper, "unitriangular": unit}
    assert certified(linalg.solve_triangular, A, B, **options).undo.operands == (1,)
    assert certified(linalg.solve_triangular, A, B.mT, left=False, **options).undo.operands == (1,)
    assert certified(linalg.solve_triangular, A, B, dynamic={id(A)}, **options).erasure.elements == 2 * 6
    number, right = A[:, :1, :1].clone(), B[:, :1].clone()
    alone = certified(linalg.solve_triangular, number, right, dynamic={id(number)}, **options)
    assert alone.label is (Label.K if unit else Label.S)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_older_triangular_solver_hands_its_matrix_through(certified, transpose):
    assert certified(torch.triangular_solve, B, A, transpose=transpose).undo.operands == (0,)
    assert certified(torch.triangular_solve, B, A, True, transpose, True, dynamic={id(A)}).label is Label.S


@pytest.mark.parametrize("upper", [False, True])
def test_systems_with_a_cholesky_factor(certified, upper):
    assert certified(torch.cholesky_solve, B, A, upper).undo.operands == (0,)
    assert certified(torch.cholesky_solve, B, A, upper, dynamic={id(A)}).label is Label.K


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_systems_with_factors_of_lu(certified, left, adjoint):
    packed, pivots = linalg.lu_factor(A)
    options = {"left": left, "adjoint": adjoint}
    side, wide = (B, torch.randn(2, 4, 6, dtype=torch.double)) if left else (B.mT, torch.randn(2, 6, 4).double())
    assert certified(linalg.lu_solve, packed, pivots, side, **options).undo.operands == (2,)
    only = {"dynamic": {id(packed)}}
    assert certified(linalg.lu_solve, packed, pivots, side, **only, **options).erasure.elements == 2 * 4
    assert certified(linalg.lu_solve, packed, pivots, wide, **only, **options).undo.operands == (0,)


def test_the_older_lu_solver(certified):
    packed, pivots = linalg.lu_factor(A)
    assert certified(torch.lu_solve, B, packed, pivots).undo.operands == (0,)
    assert certified(torch.lu_solve, B, packed, pivots, dynamic={id(packed)}).label is Label.GRAY


def test_systems_with_symmetric_factors(certified):
    packed, pivots = linalg.ldl_factor(A + A.mT)
    assert certified(linalg.ldl_solve, packed, pivots, B).undo.operands == (2,)
    assert certified(linalg.ldl_solve, packed, pivots, B, dynamic={id(packed)}).erasure.elements == 2 * 6


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_rotations_by_reflectors_are_turned_back(certified, left, transpose):
    packed, tau = torch.geqrf(A)
    other = B if left else B.mT
    assert certified(torch.ormqr, packed, tau, other, left, transpose).undo.operands == (2,)
    assert certified(torch.ormqr, packed, tau, other, left, transpose, dynamic={id(packed)}).erasure.elements == 2 * 10
    packed, tau = torch.geqrf(torch.randn(2, 5).double())
    wide = certified(torch.ormqr, packed, tau, torch.eye(2).double(), left, transpose, dynamic={id(packed)})
    assert wide.erasure.elements == 5 + 4


def test_least_squares_lose_the_residual(certified):
    tall, wide = torch.randn(5, 3, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    assert certified(linalg.lstsq, tall, torch.randn(5, 2).double()).erasure.elements == 2 * (5 - 3)
    assert certified(linalg.lstsq, tall, torch.randn(5, 2).double(), driver="gels").erasure.elements == 2 * (5 - 3 - 1)
    assert certified(linalg.lstsq, tall[:4], torch.randn(4, 2).double(), driver="gels").erasure == Erasure(bits=2)
    assert certified(linalg.lstsq, wide, torch.randn(3, 2).double()).undo.operands == (1,)
    assert certified(linalg.lstsq, tall, torch.randn(5, 6).double(), dynamic={id(tall)}).label is Label.S
    # Two solutions of three numbers, and two residuals.
    assert certified(linalg.lstsq, tall, torch.randn(5, 2).double(), dynamic={id(tall)}).erasure.elements == 15 - 8


@pytest.mark.parametrize("dims", [None, (0, 2)])
def test_systems_of_tensors(certified, dims):
    shape = (2, 3, 6) if dims is None else (2, 6, 3)
    matrix = torch.randn(shape, dtype=torch.double)
    side = torch.randn(2, 3, dtype=torch.double) if dims is None else torch.randn(6, dtype=torch.double)
    assert certified(linalg.tensorsolve, matrix, side, dims).undo.operands == (1,)
    assert certified(linalg.tensorsolve, matrix, side, dims, dynamic={id(matrix)}).erasure.elements == 30
