"""Solutions of linear systems: the right-hand side is the matrix times the solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.affine import batch
from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.contraction import Terms, solve, system, value_of
from bwsk_fx.rules.linalg import ignores, per_matrix, strict_triangle, unpacked
from bwsk_fx.rules.registry import Call, erases, labels, others, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Run, Undo, unbroadcast, wide
from bwsk_fx.verdict import REFINED, Verdict

linalg = torch.linalg


def right_hand_side(call: Call, side: Any, multiply: Callable[[Run], Tensor]) -> Verdict | None:
    """Return S for a dynamic right-hand side that a multiplication rebuilds; None where it is static."""
    if not call.is_dynamic(side) or sum(argument is side for argument in call.args) > 1:
        return None
    number = call.operands.index(side)
    undo = Undo(multiply, (number,))
    return preserves("the matrix times the solution is the right-hand side", others(call, number), REFINED, undo=undo)


def solution(run: Run) -> Tensor:
    """Return the solution in float64, which some operators return with more results."""
    result = run.value
    return result.to(wide(result.dtype))


def widened(matrix: Tensor) -> Tensor:
    """Return a matrix in float64 (complex128)."""
    return matrix.to(wide(matrix.dtype))


def is_vector(matrix: Tensor, side: Tensor) -> bool:
    """Whether a right-hand side is a batch of vectors, as `linalg.solve` tells it."""
    return side.dim() == 1 or (matrix.dim() - 1 == side.dim() and side.shape == matrix.shape[:-1])


def applied(matrix: Tensor, run: Run, side: Tensor, left: bool = True) -> Tensor:
    """Return matrix · solution (or solution · matrix) in the shape of the right-hand side."""
    result = solution(run)
    if left and result.dim() == matrix.dim() - 1 and is_vector(matrix, side):
        return unbroadcast((matrix @ result.unsqueeze(-1)).squeeze(-1), side.shape)
    return unbroadcast(matrix @ result if left else result @ matrix, side.shape)


@labels(linalg.solve, linalg.solve_ex, atens="_linalg_solve_ex linalg_solve linalg_solve_ex")
def solve_system(call: Call) -> Verdict:
    """The right-hand side, or the matrix where there are enough of them."""
    matrix, side = call.argument(0, "A"), call.argument(1, "B")
    return right_hand_side(call, side, _undo_solve) or matrix_of(call, matrix, side)


def _undo_solve(run: Run) -> Tensor:
    matrix, side = run.argument(0, "A"), run.argument(1, "B")
    return applied(widened(matrix), run, side, run.kwargs.get("left", True))


def matrix_of(call: Call, matrix: Any, side: Any) -> Verdict:
    """Return the verdict of a system whose matrix is the unknown: solution and right-hand side are equations for it."""
    if not call.is_dynamic(matrix) or matrix is side:
        return unproven("the matrix of the system is its right-hand side, or static")
    terms = system_terms(call)
    equations = system(terms, 0)
    if not equations.determined:
        if equations.unknowns is None or equations.equations is None:
            return unproven("its sizes vary with the batch")
        missing, total = equations.unknowns - equations.equations, elements(value_of(matrix))
        lost = None if total is None else total // equations.unknowns * missing
        return erases(f"{equations.equations} solutions do not determine the matrix", lost, confidence=REFINED)
    number = call.operands.index(matrix)
    why = "as many right-hand sides as unknowns determine the matrix"
    undo = Undo(_undo_matrix, (number,))
    return preserves(why, others(call, number), REFINED, undo=undo, domain="the solutions have full rank")


def system_terms(arguments: Arguments) -> Terms:
    """Return A · X = B as a product of A and X; X stands for its shape alone."""
    matrix, side = arguments.argument(0, "A"), arguments.argument(1, "B")
    a, b = value_of(matrix), value_of(side)
    made = arguments.node.meta["val"] if isinstance(arguments, Call) else arguments.output  # type: ignore[attr-defined]
    made = made if isinstance(made, Tensor) else made[0]
    leading = batch(a.dim() - 2)
    if is_vector(a, b):
        mine = batch(made.dim() - 1)
        return Terms(matrix, made, (leading + "ij", mine + "j", mine + "i"))
    mine = batch(made.dim() - 2)
    if arguments.kwargs.get("left", True):
        return Terms(matrix, made, (leading + "ij", mine + "jk", mine + "ik"))
    return Terms(matrix, made, (leading + "ij", mine + "ki", mine + "kj"))


def _undo_matrix(run: Run) -> Tensor:
    terms = system_terms(run)
    side = widened(run.argument(1, "B"))
    leading = math.prod(terms.right.shape) // max(1, side.numel())
    return solve(terms, 0, side.expand(terms.right.shape) if leading > 1 else side)


@labels(linalg.solve_triangular, atens="linalg_solve_triangular")
def solve_triangular(call: Call) -> Verdict:
    """The right-hand side; one triangle of the matrix is never read."""
    verdict = right_hand_side(call, call.argument(1, "B"), _undo_triangular)
    if verdict is None and value_of(call.argument(0, "A")).shape[-1] == 1:
        if call.kwargs.get("unitriangular", False):
            return erases("its one element is taken to be one", call.elements(), confidence=REFINED)
        return matrix_of(call, call.argument(0, "A"), call.argument(1, "B"))
    return verdict or ignores(call, "it reads one triangle, and the other one is lost", strict_triangle)


def _undo_triangular(run: Run) -> Tensor:
    kept = _triangle(widened(run.argument(0, "A")), run.kwargs["upper"], run.kwargs.get("unitriangular", False))
    return applied(kept, run, run.argument(1, "B"), run.kwargs.get("left", True))


def _triangle(matrix: Tensor, upper: bool, unit: bool) -> Tensor:
    kept = matrix.triu() if upper else matrix.tril()
    if unit:
        kept = kept - torch.diag_embed(kept.diagonal(dim1=-2, dim2=-1)) + torch.eye(kept.shape[-1], dtype=kept.dtype)
    return kept


@labels(ops="triangular_solve")
def triangular_solve(call: Call) -> Verdict:
    """The right-hand side; the matrix is handed through."""
    side, matrix = call.argument(0, "b", call.kwargs.get("input")), call.argument(1, "A")
    verdict = right_hand_side(call, side, _undo_triangular_solve)
    if verdict is not None or not call.is_dynamic(matrix):
        return verdict or unproven("its operands are static")
    number = call.operands.index(matrix)
    undo = Undo(_second_result, (number,))
    return preserves("the second result is the matrix", others(call, number), REFINED, undo=undo)


def _second_result(run: Run) -> Tensor:
    return unbroadcast(run.output[1], run.argument(1, "A").shape)


def _undo_triangular_solve(run: Run) -> Tensor:
    matrix = widened(run.argument(1, "A"))
    kept = _triangle(matrix, run.argument(2, "upper", True), run.argument(4, "unitriangular", False))
    kept = kept.mT if run.argument(3, "transpose", False) else kept
    return unbroadcast(kept @ solution(run), run.args[0].shape)


@labels(ops="cholesky_solve")
def cholesky_solve(call: Call) -> Verdict:
    """The right-hand side; one triangle of the factor is never read."""
    side, factor = call.argument(0, "B", call.kwargs.get("input")), call.argument(1, "L", call.kwargs.get("input2"))
    verdict = right_hand_side(call, side, _undo_cholesky_solve)
    if verdict is not None:
        return verdict
    sizes = value_of(factor).shape[-1]
    return erases("it reads one triangle of the factor") if sizes != 1 else unproven("its factor is one number")


def _undo_cholesky_solve(run: Run) -> Tensor:
    factor = widened(run.argument(1, "L", run.kwargs.get("input2")))
    upper = run.argument(2, "upper", False)
    kept = factor.triu() if upper else factor.tril()
    matrix = kept.mH @ kept if upper else kept @ kept.mH
    return unbroadcast(matrix @ solution(run), run.args[0].shape)


@labels(ops="lu_solve")
def lu_solve(call: Call) -> Verdict:
    """The right-hand side of a system whose matrix is factored already."""
    side = call.argument(0, "b", call.kwargs.get("input"))
    return right_hand_side(call, side, _undo_lu_solve) or unproven("only the factors of its matrix are dynamic")


def _undo_lu_solve(run: Run) -> Tensor:
    return unbroadcast(unpacked(run.args[1], run.args[2]) @ solution(run), run.args[0].shape)


@labels(linalg.lu_solve, atens="linalg_lu_solve")
def linalg_lu_solve(call: Call) -> Verdict:
    """The right-hand side of a system whose matrix is factored already; the factors, with enough of them."""
    packed, side = call.argument(0, "LU"), call.argument(2, "B")
    verdict = right_hand_side(call, side, _undo_linalg_lu_solve)
    if verdict is not None:
        return verdict
    size, count = value_of(packed).shape[-1], value_of(side).shape[-1 if call.kwargs.get("left", True) else -2]
    if not call.is_dynamic(packed) or as_int(size) is None or as_int(count) is None:
        return unproven("only its pivots are dynamic, or its sizes vary with the batch")
    if math.prod(call.value.shape[:-2]) > math.prod(value_of(packed).shape[:-2]):
        return unproven("whether several right-hand sides determine the factors depends on them")
    if count < size:
        lost = per_matrix(call, lambda *_: size * (size - count))
        return erases(f"{count} solutions do not determine the matrix", lost, confidence=REFINED)
    number = call.operands.index(packed)
    undo = Undo(_undo_factors, (number,))
    why, domain = "solutions and right-hand sides determine the factors", "the solutions have full rank"
    return preserves(why, others(call, number), REFINED, undo=undo, domain=domain)


def _lu_matrix(run: Run) -> Tensor:
    matrix = unpacked(run.argument(0, "LU"), run.argument(1, "pivots"))
    return matrix.mH if run.kwargs.get("adjoint", False) else matrix


def _undo_linalg_lu_solve(run: Run) -> Tensor:
    return applied(_lu_matrix(run), run, run.argument(2, "B"), run.kwargs.get("left", True))


def _undo_factors(run: Run) -> Tensor:
    side, found = widened(run.argument(2, "B")), solution(run)
    left = run.kwargs.get("left", True)
    matrix = side @ linalg.pinv(found) if left else linalg.pinv(found) @ side
    matrix = matrix.mH if run.kwargs.get("adjoint", False) else matrix
    packed = run.argument(0, "LU")
    identity = torch.zeros(packed.shape, dtype=matrix.dtype)
    order = torch.lu_unpack(identity, run.argument(1, "pivots"))[0]
    return without_pivots(order.mT @ matrix)


def without_pivots(matrix: Tensor) -> Tensor:
    """Return L and U packed, of a matrix whose rows are in the order of its pivots already."""
    packed = matrix.clone()
    for row in range(packed.shape[-1] - 1):
        packed[..., row + 1 :, row] /= packed[..., row, row].unsqueeze(-1)
        update = packed[..., row + 1 :, row].unsqueeze(-1) * packed[..., row, row + 1 :].unsqueeze(-2)
        packed[..., row + 1 :, row + 1 :] -= update
    return packed


@labels(linalg.ldl_solve, atens="linalg_ldl_solve")
def ldl_solve(call: Call) -> Verdict:
    """The right-hand side; one triangle of the factors is never read."""
    verdict = right_hand_side(call, call.argument(2, "B"), _undo_ldl_solve)
    return verdict or ignores(call, "it reads one triangle, and the other one is lost", strict_triangle)


def _undo_ldl_solve(run: Run) -> Tensor:
    factors = widened(run.argument(0, "LD"))
    units = torch.eye(factors.shape[-1], dtype=factors.dtype).expand_as(factors).clone()
    hermitian = run.kwargs.get("hermitian", False)
    inverse = linalg.ldl_solve(factors, run.argument(1, "pivots"), units, hermitian=hermitian)
    return unbroadcast(linalg.solve(inverse, solution(run)), run.argument(2, "B").shape)


@labels(ops="ormqr")
def ormqr(call: Call) -> Verdict:
    """What is rotated; of the reflectors only what is below the diagonal is read."""
    verdict = right_hand_side(call, call.argument(2, "other", call.kwargs.get("input3")), _undo_ormqr)
    return verdict or ignores(call, "it reads the reflectors below the diagonal alone", _upper)


def _upper(rows: int, columns: int) -> int:
    return sum(max(columns - row, 0) for row in range(rows))


def _undo_ormqr(run: Run) -> Tensor:
    reflectors, tau = (widened(run.argument(place, name)) for place, name in ((0, "input"), (1, "tau")))
    left, transposed = run.argument(3, "left", True), run.argument(4, "transpose", False)
    return torch.ormqr(reflectors, tau, widened(run.output), left, not transposed)


@labels(linalg.lstsq, atens="linalg_lstsq")
def least_squares(call: Call) -> Verdict:
    """The right-hand side of a system that has an exact solution; the residual is lost otherwise."""
    matrix, side = call.argument(0, "A", call.kwargs.get("self")), call.argument(1, "B", call.kwargs.get("b"))
    rows, columns = (as_int(size) for size in value_of(matrix).shape[-2:])
    if rows is None or columns is None:
        return unproven("its sizes vary with the batch")
    if not call.is_dynamic(side):
        return _least_squares_matrix(call, rows, columns, side)
    if rows > columns:
        return _without_residual(call, rows, columns, value_of(side))
    return right_hand_side(call, side, _undo_least_squares) or unproven("the matrix is its own right-hand side")


def _without_residual(call: Call, rows: int, columns: int, side: Tensor) -> Verdict:
    """Return what goes of each right-hand side: its residual, of which all drivers but one return the length."""
    total, driver = elements(side), call.kwargs.get("driver") or ("gelsy" if side.device.type == "cpu" else "gels")
    sides = None if total is None else total // rows
    lost = rows - columns - (driver != "gelsy")
    if lost == 0:
        return erases("the sign of each residual is lost", bits=sides, confidence=REFINED)
    return erases("the residual is lost", None if sides is None else sides * lost, confidence=REFINED)


def _least_squares_matrix(call: Call, rows: int, columns: int, side: Any) -> Verdict:
    matrix, right = value_of(call.operands[0]), value_of(side)
    count = 1 if right.dim() == matrix.dim() - 1 else as_int(right.shape[-1])
    made = 0 if count is None else count * (columns + 1 if rows > columns else columns)
    if count is None or right.dim() > matrix.dim():
        return unproven("whether the solutions determine the matrix depends on them")
    if made < rows * columns:
        lost = per_matrix(call, lambda *_: rows * columns - made)
        return erases("the solutions do not determine the matrix", lost, confidence=REFINED)
    if count < rows or right.shape[:-2] != matrix.shape[:-2]:
        return unproven("whether the solutions determine the matrix depends on them")
    why, domain = "the solutions are the pseudo-inverse times the right-hand sides", "all have full rank"
    return preserves(why, confidence=REFINED, undo=Undo(_undo_pseudo_inverse), domain=domain)


def _undo_pseudo_inverse(run: Run) -> Tensor:
    side = widened(run.argument(1, "B", run.kwargs.get("b")))
    return linalg.pinv(solution(run) @ linalg.pinv(side))


def _undo_least_squares(run: Run) -> Tensor:
    matrix, side = (run.argument(0, "A", run.kwargs.get("self")), run.argument(1, "B", run.kwargs.get("b")))
    return applied(widened(matrix), run, side)


@labels(linalg.tensorsolve, atens="linalg_tensorsolve")
def tensor_solve(call: Call) -> Verdict:
    """The right-hand side of a system of tensors."""
    matrix, side = call.argument(0, "A"), call.argument(1, "B")
    verdict = right_hand_side(call, side, _undo_tensorsolve)
    if verdict is not None or not call.is_dynamic(matrix):
        return verdict or unproven("its operands are static")
    count = math.prod(value_of(side).shape)
    if as_int(count) is None or count < 2:
        return unproven("a system of one number")
    return erases("one solution does not determine the matrix", count * (count - 1), confidence=REFINED)


def _undo_tensorsolve(run: Run) -> Tensor:
    matrix, side = widened(run.argument(0, "A")), run.argument(1, "B")
    dims = run.argument(2, "dims")
    if dims is not None:
        matrix = matrix.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return torch.tensordot(matrix, solution(run), run.output.dim()).reshape(side.shape)
