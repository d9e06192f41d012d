"""Factorizations, whose results multiply back to the operand, and functions of matrices that erase."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.affine import first
from bwsk_fx.rules.contraction import by_counting, value_of
from bwsk_fx.rules.registry import Call, erases, labels, preserves, target_name, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Run, Undo, as_it_is, wide
from bwsk_fx.verdict import REFINED, Verdict

linalg = torch.linalg


def _multiplied_back(call: Call, multiply: Callable[[Run], Tensor], domain: str | None = None) -> Verdict:
    why = "its results multiply back to the operand"
    return preserves(why, confidence=REFINED, undo=Undo(multiply), domain=domain)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(wide(tensor.dtype)) for tensor in tensors)


def _like(rebuilt: Tensor, run: Run) -> Tensor:
    """Return the real part of what is rebuilt where the operand is real."""
    return rebuilt.real if rebuilt.is_complex() and not run.before.is_complex() else rebuilt


def matrix_size(call: Call) -> tuple[int | None, int | None]:
    """Return rows and columns of the first argument; None where they vary with the batch."""
    rows, columns = value_of(first(call)).shape[-2:]
    return as_int(rows), as_int(columns)


def per_matrix(call: Call, erased: Callable[[int, int], int]) -> int | None:
    """Return erased elements per sample, given those of one matrix of some rows and columns."""
    rows, columns = matrix_size(call)
    total = elements(value_of(first(call)))
    if rows is None or columns is None or total is None:
        return None
    return total // (rows * columns) * erased(rows, columns)


def strict_triangle(_: int, columns: int) -> int:
    """Return how many elements of a square matrix are above its diagonal."""
    return columns * (columns - 1) // 2


def ignores(call: Call, why: str, erased: Callable[[int, int], int]) -> Verdict:
    """Return K for a call that never reads a part of its matrices; GRAY for matrices without that part."""
    lost = per_matrix(call, erased)
    return unproven(f"{why}, of which this matrix has none") if lost == 0 else erases(why, lost, confidence=REFINED)


# -- factorizations -------------------------------------------------------------------------------------------------


@labels(linalg.qr, ops="qr", atens="linalg_qr")
def qr(call: Call) -> Verdict:
    """Q R; with R alone the rotation is lost."""
    if call.argument(1, "mode", "reduced") == "r":
        return ignores(call, "without Q, the rotation is lost", _rotation)
    return _multiplied_back(call, _undo_qr)


def _rotation(rows: int, columns: int) -> int:
    rank = min(rows, columns)
    return rows * columns - (rank * columns - rank * (rank - 1) // 2)


def _undo_qr(run: Run) -> Tensor:
    q, r = _wide(*run.output)
    return q @ r


@labels(torch.geqrf, methods="geqrf", atens="geqrf")
def geqrf(call: Call) -> Verdict:
    """Householder reflectors and R, packed."""
    return _multiplied_back(call, _undo_geqrf)


def _undo_geqrf(run: Run) -> Tensor:
    packed, tau = _wide(*run.output)
    rank = min(packed.shape[-2:])
    return linalg.householder_product(packed[..., :rank], tau) @ packed[..., :rank, :].triu()


@labels(linalg.householder_product, ops="orgqr", atens="linalg_householder_product")
def householder_product(call: Call) -> Verdict:
    """Reads reflectors below the diagonal alone."""
    return ignores(call, "it reads the reflectors below the diagonal alone", _upper)


def _upper(_: int, columns: int) -> int:
    return columns * (columns + 1) // 2


@labels(linalg.svd, atens="_linalg_svd")
def svd(call: Call) -> Verdict:
    """U S Vᴴ; with S alone both rotations are lost."""
    if call.argument(2, "compute_uv", True) is False:
        return singular_values(call)
    return _multiplied_back(call, _undo_svd)


def _undo_svd(run: Run) -> Tensor:
    u, s, vh = _wide(*run.output)
    rank = s.shape[-1]
    return (u[..., :rank] * s.unsqueeze(-2)) @ vh[..., :rank, :]


@labels(ops="svd")
def transposed_svd(call: Call) -> Verdict:
    """U S V, whose V is not transposed."""
    if call.argument(2, "compute_uv", True) is False:
        return singular_values(call)
    return _multiplied_back(call, _undo_transposed_svd)


def _undo_transposed_svd(run: Run) -> Tensor:
    u, s, v = _wide(*run.output)
    rank = s.shape[-1]
    return (u[..., :rank] * s.unsqueeze(-2)) @ v[..., :rank].mH


@labels(linalg.svdvals, linalg.eigvals, atens="linalg_svdvals linalg_eigvals")
def singular_values(call: Call) -> Verdict:
    """The singular values or eigenvalues alone."""
    return ignores(call, "without vectors, the directions are lost", _directions)


def _directions(rows: int, columns: int) -> int:
    return rows * columns - min(rows, columns)


@labels(linalg.eig, atens="linalg_eig")
def eig(call: Call) -> Verdict:
    """V diag(w) V⁻¹."""
    return _multiplied_back(call, _undo_eig, "matrices with as many eigenvectors as rows")


def _undo_eig(run: Run) -> Tensor:
    values, vectors = _wide(*run.output)
    return _like(linalg.solve(vectors, vectors * values.unsqueeze(-2), left=False), run)


@labels(linalg.lu, atens="linalg_lu")
def lu(call: Call) -> Verdict:
    """P L U."""
    if call.kwargs.get("pivot", True) is False:
        return unproven("without pivots it runs on a GPU alone")
    return _multiplied_back(call, _undo_lu)


def _undo_lu(run: Run) -> Tensor:
    p, lower, upper = _wide(*run.output)
    return p.to(lower.dtype) @ lower @ upper


@labels(linalg.lu_factor, linalg.lu_factor_ex, atens="linalg_lu_factor linalg_lu_factor_ex _lu_with_info")
@labels(torch.lu, methods="lu")
def lu_factor(call: Call) -> Verdict:
    """L and U packed, and pivots."""
    if call.kwargs.get("pivot", True) is False:
        return unproven("without pivots it runs on a GPU alone")
    return _multiplied_back(call, _undo_lu_factor)


def _undo_lu_factor(run: Run) -> Tensor:
    return unpacked(run.output[0], run.output[1])


def unpacked(packed: Tensor, pivots: Tensor) -> Tensor:
    """Return the matrix whose factors `lu_factor` has packed, in float64."""
    p, lower, upper = torch.lu_unpack(packed.to(wide(packed.dtype)), pivots)
    return p @ lower @ upper


@labels(torch.lu_unpack, atens="lu_unpack")
def lu_unpack(call: Call) -> Verdict:
    """L and U beside each other are L and U packed."""
    if not call.is_dynamic(first(call)):
        return unproven("only its pivots are dynamic")
    if call.argument(2, "unpack_data", True) is False:
        return erases("the factors are not unpacked", elements(value_of(first(call))), confidence=REFINED)
    number = call.operands.index(first(call))
    return preserves("L and U, put together, are the operand", confidence=REFINED, undo=Undo(_undo_unpack, (number,)))


def _undo_unpack(run: Run) -> Tensor:
    _, lower, upper = run.output
    packed = first(run)
    made = torch.zeros(packed.shape, dtype=packed.dtype)
    made[..., :, : lower.shape[-1]] += lower.tril(-1)
    made[..., : upper.shape[-2], :] += upper.triu()
    return made


@labels(torch.svd_lowrank, torch.pca_lowrank)
def low_rank(call: Call) -> Verdict:
    """A random sketch keeps as many singular values as it is asked for; PCA also takes the means off."""
    rows, columns = matrix_size(call)
    if rows is None or columns is None or call.argument(3, "M") is not None:
        return unproven("its sizes vary with the batch, or a matrix is taken off first")
    if call.operands != (first(call),):
        return unproven("its matrix is static")
    centred = rule_is_pca(call) and call.argument(2, "center", True)
    asked = call.argument(1, "q")
    kept = min(6, rows, columns) if asked is None else asked
    lost = (rows - kept) * (columns - kept)
    if lost > 0 or centred:
        why = "it keeps the largest singular values alone" if lost else "the means are taken off"
        return erases(why, per_matrix(call, lambda *_: max(lost, columns if centred else 0)), confidence=REFINED)
    return _multiplied_back(call, _undo_transposed_svd)


def rule_is_pca(call: Call) -> bool:
    """Whether a low-rank factorization is a principal component analysis."""
    return call.node.target is torch.pca_lowrank


# -- what reads one triangle ----------------------------------------------------------------------------------------


@labels(ops="cholesky cholesky_inverse", atens="linalg_cholesky_ex linalg_cholesky linalg_eigh _linalg_eigh")
@labels(linalg.cholesky, linalg.cholesky_ex, linalg.ldl_factor, linalg.ldl_factor_ex, linalg.eigh)
@labels(atens="linalg_ldl_factor_ex linalg_ldl_factor")
def one_triangle(call: Call) -> Verdict:
    """Takes the operand to be Hermitian, or triangular, and reads one triangle."""
    return ignores(call, "it reads one triangle, and the other one is lost", strict_triangle)


@labels(linalg.eigvalsh, atens="linalg_eigvalsh")
def eigvalsh(call: Call) -> Verdict:
    """Eigenvalues of a Hermitian matrix: the other triangle and the directions are lost."""
    return ignores(call, "without vectors, the directions are lost", _directions)


# -- functions of square matrices -----------------------------------------------------------------------------------


@labels(linalg.inv, linalg.inv_ex, ops="inverse", atens="linalg_inv_ex linalg_inv")
def inverse(call: Call) -> Verdict:
    """The inverse of the inverse."""
    return _inverted_again(_undo_inverse, "the matrix is regular")


def _inverted_again(rebuild: Callable[[Run], Tensor], domain: str) -> Verdict:
    return preserves("inverting again rebuilds the operand", confidence=REFINED, undo=Undo(rebuild), domain=domain)


def _undo_inverse(run: Run) -> Tensor:
    result = run.value
    return linalg.inv_ex(*_wide(result))[0]


@labels(linalg.pinv, ops="pinverse", atens="linalg_pinv")
def pseudo_inverse(call: Call) -> Verdict:
    """The pseudo-inverse of the pseudo-inverse, as long as no singular value is cut off on purpose."""
    if call.kwargs.get("hermitian") or call.argument(3, "hermitian", False) is True:
        return ignores(call, "it reads one triangle, and the other one is lost", strict_triangle)
    if not call.is_dynamic(first(call)):
        return unproven("its matrix is static")
    cuts = [call.kwargs.get(name) for name in ("atol", "rtol", "rcond")]
    cuts += [argument for argument in call.args[1:] if not isinstance(argument, bool)]
    sizes = [_cut(call, cut) for cut in cuts if cut is not None]
    rounding = max(call.before.shape[-2:]) * torch.finfo(call.before.dtype).eps
    if any(size is None or size > rounding for size in sizes):
        return erases("singular values below the cut-off are lost", confidence=REFINED)
    domain = "no singular value is below the cut-off"
    undo = Undo(_undo_pseudo_inverse)
    return preserves("the pseudo-inverse of the result is the operand", confidence=REFINED, undo=undo, domain=domain)


def _cut(call: Call, cut: Any) -> float | None:
    """Return a cut-off as a number, the largest of several; None where it is not at hand."""
    if isinstance(cut, (int, float)):
        return float(cut)
    value = call.static(cut)
    return None if value is None else float(value.max()) if value.numel() else 0.0


def _undo_pseudo_inverse(run: Run) -> Tensor:
    noise = max(run.output.shape[-2:]) * torch.finfo(run.output.dtype).eps * 4
    return linalg.pinv(*_wide(run.output), rtol=noise)


@labels(linalg.tensorinv, atens="linalg_tensorinv")
def tensor_inverse(call: Call) -> Verdict:
    """The inverse of a tensor as a matrix."""
    return _inverted_again(_undo_tensorinv, "the tensor is regular")


def _undo_tensorinv(run: Run) -> Tensor:
    return linalg.tensorinv(*_wide(run.output), ind=run.output.dim() - run.argument(1, "ind", 2))


@labels(linalg.matrix_power, ops="matrix_power")
def matrix_power(call: Call) -> Verdict:
    """The powers one and minus one; others have several roots."""
    power = call.argument(1, "n")
    if power == 0:
        return erases("the power zero is the identity", call.elements(), confidence=REFINED)
    if power == 1:
        return preserves("the power one is the operand", confidence=REFINED, undo=Undo(as_it_is))
    if power == -1:
        return inverse(call)
    if power % 2 == 0:
        return erases("a matrix and its negative have the same even power", bits=1, confidence=REFINED)
    if call.before.shape[-1] == 1 and not call.before.is_complex():
        undo = Undo(partial(_odd_root, power))
        return preserves("odd powers of numbers have one root", confidence=REFINED, undo=undo)
    return erases("a rotation by a full turn over the exponent has the power of the identity", confidence=REFINED)


def _odd_root(power: int, run: Run) -> Tensor:
    (result,) = _wide(run.output)
    return result.sign() * result.abs() ** (1 / power)


@labels(linalg.matrix_exp, ops="matrix_exp", atens="linalg_matrix_exp")
def matrix_exp(call: Call) -> Verdict:
    """Full turns of a rotation are lost."""
    if call.before.shape[-1] == 1 and not call.before.is_complex():
        return preserves("the exponential of a number", confidence=REFINED, undo=Undo(_logarithm))
    return erases("rotations by whole turns more have the same exponential", confidence=REFINED)


def _logarithm(run: Run) -> Tensor:
    return _wide(run.output)[0].log()


@labels(linalg.det, ops="det trace logdet", atens="linalg_det")
def number_per_matrix(call: Call) -> Verdict:
    """One number per matrix, which is the element of a one-by-one matrix, or its logarithm."""
    if call.before.shape[-1] == call.before.shape[-2] == 1:
        logarithm = "logdet" in target_name(call)
        undo, domain = (Undo(_undo_logdet), "positive elements") if logarithm else (Undo(_undo_single), None)
        return preserves("the number of a one-by-one matrix", confidence=REFINED, undo=undo, domain=domain)
    return by_counting(call, "one number is left of each matrix")


def _undo_single(run: Run) -> Tensor:
    return run.output.reshape(run.before.shape)


def _undo_logdet(run: Run) -> Tensor:
    return _wide(run.output)[0].exp().reshape(run.before.shape)


@labels(linalg.slogdet, ops="slogdet", atens="linalg_slogdet")
def slogdet(call: Call) -> Verdict:
    """Sign and logarithm of one number per matrix."""
    if call.before.shape[-1] == call.before.shape[-2] == 1:
        return preserves("sign and logarithm of the element", confidence=REFINED, undo=Undo(_undo_slogdet))
    return by_counting(call, "one number is left of each matrix")


def _undo_slogdet(run: Run) -> Tensor:
    sign, logarithm = _wide(*run.output)
    return (sign * logarithm.exp()).reshape(run.before.shape)


@labels(linalg.cond, linalg.matrix_rank, linalg.matrix_norm, torch.nuclear_norm, atens="linalg_matrix_norm linalg_cond")
def measure(call: Call) -> Verdict:
    """One number per matrix, of which even one-by-one matrices lose the sign."""
    if call.before.shape[-1] == call.before.shape[-2] == 1:
        return erases("a matrix and its negative have the same norm", bits=1, confidence=REFINED)
    return by_counting(call, "one number is left of each matrix")


@labels(atens="_linalg_det _linalg_slogdet")
def packed_determinant(call: Call) -> Verdict:
    """The determinant with the factors that it is computed from."""
    return preserves("its factors multiply back to the operand", confidence=REFINED, undo=Undo(_undo_packed))


def _undo_packed(run: Run) -> Tensor:
    packed, pivots = run.output[-2:]
    # A contiguous real matrix is factored in LAPACK's order, as its transpose.
    transposed = run.before.is_contiguous() and not run.before.is_complex()
    return unpacked(packed, pivots).mT if transposed else unpacked(packed, pivots)
