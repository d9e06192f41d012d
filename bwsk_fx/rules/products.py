"""Products with a summand, products of vectors, outer products, and sums over named dimensions."""

from __future__ import annotations

import string
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.affine import batch, first
from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, axis_rule, claims, opaque
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.composition import compose
from bwsk_fx.rules.contraction import FULL_RANK, Terms, by_counting, product, solve, value_of
from bwsk_fx.rules.registry import Call, erases, labels, others, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.spelling import function_name
from bwsk_fx.rules.undo import Run, Undo, unbroadcast, wide
from bwsk_fx.verdict import REFINED, Verdict

# Of each product with a summand: the letters of its factors and of the product.
_SUMMED = {
    "addmm": ("ri", "ic", "rc"),
    "addmv": ("ri", "i", "r"),
    "addbmm": ("bri", "bic", "rc"),
    "baddbmm": ("bri", "bic", "brc"),
    "addr": ("r", "c", "rc"),
}


@labels(ops=" ".join(_SUMMED))
def fused_product(call: Call) -> Verdict:
    """Beta · summand + alpha · product: the summand, else a factor, is rebuilt."""
    return product(call, fused_terms)


def fused_terms(arguments: Arguments) -> Terms:
    """Read `addmm(input, mat1, mat2, beta=1, alpha=1)` and its kin."""
    name = function_name(arguments)
    pairs = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "addr": ("vec1", "vec2")}
    one, two = pairs.get(name, ("batch1", "batch2"))
    summand = arguments.argument(0, "input", arguments.kwargs.get("self"))
    beta, alpha = arguments.kwargs.get("beta", 1), arguments.kwargs.get("alpha", 1)
    return Terms(arguments.argument(1, one), arguments.argument(2, two), _SUMMED[name], summand, beta, alpha)


@labels(ops="dot vdot inner outer ger kron")
def vectors(call: Call) -> Verdict:
    """Products of vectors, and of each number with each."""
    return product(call, vector_terms)


def vector_terms(arguments: Arguments) -> Terms:
    """Read `dot(input, tensor)` and its kin."""
    left, name = arguments.argument(0, "input", arguments.kwargs.get("self")), function_name(arguments)
    names = (key for key in ("other", "tensor", "vec2") if key in arguments.kwargs)
    right = arguments.argument(1, next(names, ""))
    if name in ("dot", "vdot"):
        return Terms(left, right, ("i", "i", ""), conjugated=name == "vdot")
    if name in ("outer", "ger"):
        return Terms(left, right, ("r", "c", "rc"))
    return _kron(left, right) if name == "kron" else _inner(left, right)


def _inner(left: Any, right: Any) -> Terms:
    a, b = value_of(left).dim(), value_of(right).dim()
    if 0 in (a, b):
        mine, theirs = string.ascii_lowercase[:a], string.ascii_lowercase[a : a + b]
        return Terms(left, right, (mine, theirs, mine + theirs))
    mine, theirs = string.ascii_lowercase[1:a], string.ascii_uppercase[1:b]
    return Terms(left, right, (mine + "a", theirs + "a", mine + theirs))


def _kron(left: Any, right: Any) -> Terms:
    a, b = value_of(left).shape, value_of(right).shape
    rank = max(len(a), len(b))
    mine, theirs = string.ascii_lowercase[rank - len(a) : rank], string.ascii_uppercase[rank - len(b) : rank]
    pairs = zip(string.ascii_lowercase[:rank], string.ascii_uppercase[:rank], strict=True)
    out = "".join(one for pair in pairs for one in pair if one in mine + theirs)
    sizes = dict(zip(mine + theirs, (*a, *b), strict=True))
    return Terms(left, right, (mine, theirs, out), sizes=tuple(sizes[letter] for letter in out))


@labels(torch.linalg.vecdot, atens="linalg_vecdot")
def vecdot(call: Call) -> Verdict:
    """Products of vectors along one dimension."""
    return product(call, vecdot_terms)


def vecdot_terms(arguments: Arguments) -> Terms:
    """Read `vecdot(x, y, dim=-1)`."""
    left, right = arguments.argument(0, "x"), arguments.argument(1, "y")
    dim = arguments.argument(2, "dim", -1)
    rank = max(value_of(left).dim(), value_of(right).dim())
    every = batch(rank)
    mine, theirs = (every[rank - value_of(factor).dim() :] for factor in (left, right))
    at = every[dim]
    return Terms(left, right, (mine, theirs, every.replace(at, "")), conjugated=True)


@labels(torch.tensordot)
def tensordot(call: Call) -> Verdict:
    """A product that sums over given dimensions."""
    return product(call, tensordot_terms)


def tensordot_terms(arguments: Arguments) -> Terms:
    """Read `tensordot(a, b, dims=2)`."""
    left, right = arguments.argument(0, "a"), arguments.argument(1, "b")
    a, b = value_of(left).dim(), value_of(right).dim()
    dims = arguments.argument(2, "dims", 2)
    dims = dims.tolist() if isinstance(dims, Tensor) else dims
    mine, theirs = (range(a - dims, a), range(dims)) if isinstance(dims, int) else dims
    letters, other = list(string.ascii_lowercase[:a]), list(string.ascii_uppercase[:b])
    for one, two in zip(mine, theirs, strict=True):
        other[two] = letters[one]
    summed = {letters[one] for one in mine}
    out = [letter for letter in (*letters, *other) if letter not in summed]
    return Terms(left, right, ("".join(letters), "".join(other), "".join(out)))


@labels(torch.einsum)
def einsum(call: Call) -> Verdict:
    """Sums over named dimensions: two factors are a product, other numbers of them are composed."""
    terms = einsum_terms(call)
    return compose(call) if terms is None else product(call, partial(_einsum_of_two))


def _einsum_of_two(arguments: Arguments) -> Terms:
    terms = einsum_terms(arguments)
    assert terms is not None
    return terms


def einsum_terms(arguments: Arguments) -> Terms | None:
    """Read `einsum("ij,jk->ik", left, right)`; None for lists of subscripts and other numbers of factors."""
    equation = arguments.argument(0, "equation")
    factors: Any = arguments.args[1:]
    factors = factors[0] if len(factors) == 1 and isinstance(factors[0], (tuple, list)) else factors
    if not isinstance(equation, str) or len(factors) != 2:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    free = [letter for letter in string.ascii_uppercase[::-1] if letter not in equation]
    ranks = [value_of(factor).dim() - len(name.replace("...", "")) for factor, name in zip(factors, names, strict=True)]
    dots = ["".join(free[:rank][::-1]) for rank in ranks]
    mine, theirs = (name.replace("...", dot) for name, dot in zip(names, dots, strict=True))
    widest = max(dots, key=len) if "..." in inputs else ""
    if not arrow:
        once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
        out = "..." + "".join(once)
    return Terms(factors[0], factors[1], (mine, theirs, out.replace("...", widest)))


@labels(nn.Bilinear, F.bilinear, torch.bilinear)
def bilinear(call: Call) -> Verdict:
    """A linear map of one operand by a matrix that the other one makes of the weight."""
    one, two, weight, bias = bilinear_arguments(call)
    if call.is_dynamic(bias):
        if bias in (one, two, weight):
            return unproven("the bias is a factor, too")
        number = call.operands.index(bias)
        why = "taking the product off again rebuilds the bias"
        return preserves(why, others(call, number), REFINED, undo=Undo(_undo_bias, (number,)))
    sides = [side for side, operand in enumerate((one, two)) if call.is_dynamic(operand)]
    if one is two or not sides:
        return by_counting(call, "it is quadratic in its operand, or linear in its weight")
    made, *widths = value_of(weight).shape
    solvable = [side for side in sides if made >= widths[side]]
    if not solvable:
        width, total = widths[sides[0]], elements(value_of((one, two)[sides[0]]))
        lost = None if total is None else total // width * (width - made)
        return erases(f"{width} → {made} contracts, given the other operand", lost, confidence=REFINED)
    number = call.operands.index((one, two)[solvable[0]])
    why = f"given the other operand, {widths[solvable[0]]} → {made} does not contract"
    undo = Undo(partial(_undo_bilinear, solvable[0]), (number,))
    return preserves(why, others(call, number), REFINED, undo=undo, domain=FULL_RANK)


def _undo_bias(run: Run) -> Tensor:
    one, two, weight, bias = bilinear_arguments(run)
    product = F.bilinear(one, two, weight).to(run.output.dtype)
    return unbroadcast(run.output - product, bias.shape)


def bilinear_arguments(arguments: Arguments) -> tuple[Any, Any, Any, Any]:
    """Read `bilinear(input1, input2, weight, bias)`, or an `nn.Bilinear`."""
    one, two = arguments.argument(0, "input1"), arguments.argument(1, "input2")
    return one, two, arguments.option(2, "weight"), arguments.option(3, "bias")


def _undo_bilinear(side: int, run: Run) -> Tensor:
    one, two, weight, bias = bilinear_arguments(run)
    result = run.output.to(wide(run.output.dtype))
    result = result if bias is None else result - bias
    operands = (one, two)
    equation = "oij,...j->...oi" if side == 0 else "oij,...i->...oj"
    matrices = torch.einsum(equation, weight.to(result.dtype), operands[1 - side].to(result.dtype))
    leading = batch(one.dim() - 1)
    return solve(Terms(operands[side], matrices, (leading + "i", leading + "oi", leading + "o")), 0, result)


@labels(torch.linalg.cross, ops="cross", atens="linalg_cross")
def cross(call: Call) -> Verdict:
    """The cross product drops what is parallel to the other vector, unless it is one of several."""
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if left is right:
        return erases("the cross product of a vector with itself is zero", call.elements(), confidence=REFINED)
    operand = left if call.is_dynamic(left) else right
    total, made = elements(value_of(operand)), elements(call.value)
    if total is not None and made is not None and made > total:
        number = call.operands.index(operand)
        undo = Undo(partial(_undo_cross, 0 if operand is left else 1), (number,))
        why = "several vectors meet the same one, and determine it unless they are parallel"
        return preserves(why, others(call, number), REFINED, undo=undo, domain="the others are not all parallel")
    lost = None if total is None else total // 3
    return erases("the component parallel to the other vector is lost", lost, confidence=REFINED)


def _undo_cross(side: int, run: Run) -> Tensor:
    left, right = first(run), run.argument(1, "other")
    operands = (left, right)
    known = operands[1 - side].to(wide(run.output.dtype))
    dim = run.argument(2, "dim")
    dim = _first_three(left) if dim is None and function_name(run) == "cross" else -1 if dim is None else dim
    rank = run.output.dim()
    dim = dim % rank - rank
    axes = torch.eye(3, dtype=known.dtype).reshape([3, *[3 if at == dim else 1 for at in range(-rank, 0)]])
    known = known.expand(torch.broadcast_shapes(known.shape, (1,) * rank)).unsqueeze(0)
    pair = (axes, known) if side == 0 else (known, axes)
    matrices = torch.linalg.cross(*pair, dim=dim)
    every = batch(rank)
    mine = every[rank - operands[side].dim() :].replace(every[dim], "i")
    return solve(Terms(operands[side], matrices, (mine, "i" + every, every)), 0, run.output)


def _first_three(value: Tensor) -> int:
    return next(dim for dim, size in enumerate(value.shape) if size == 3) - value.dim()


@labels(torch.vander, torch.linalg.vander)
def vander(call: Call) -> Verdict:
    """Powers of each element: the first power is the element."""
    count = call.argument(1, "N")
    count = call.before.shape[-1] if count is None else count
    if as_int(count) is None or count < 2:
        return erases("the power zero is one", call.elements(), confidence=REFINED)
    return preserves("the first powers are the operand", confidence=REFINED, undo=Undo(_undo_vander))


def _undo_vander(run: Run) -> Tensor:
    falling = getattr(run.target, "__name__", "") == "vander" and not run.argument(2, "increasing", False)
    return run.output[..., -2 if falling else 1].reshape(run.before.shape)


@labels(*private.operators("_scaled_mm"), F.scaled_mm, atens="_scaled_mm _scaled_mm_v2")
def scaled_product(call: Call) -> Verdict:
    """A product of scaled eight-bit matrices."""
    if not all(isinstance(scale, fx.Node) for scale in _scales(call)):
        return unproven("scales of blocks are covered by no rule")
    if call.value.itemsize == 1:
        return erases("results of eight bits saturate")
    return product(call, scaled_terms)


def scaled_terms(arguments: Arguments) -> Terms:
    """Read `_scaled_mm(self, mat2, scale_a, scale_b, bias, …)`; its second version has lists of scales."""
    left, right = arguments.argument(0, "input", arguments.kwargs.get("self")), arguments.argument(1, "mat2")
    bias = arguments.argument(8 if _second_version(arguments) else 4, "bias")
    scales = _scales(arguments)
    alpha = 1 if isinstance(arguments, Call) else scales[0].double() * scales[1].double()
    return Terms(left, right, ("ri", "ic", "rc"), bias, alpha=alpha)


def _second_version(arguments: Arguments) -> bool:
    return isinstance(arguments.argument(2, "scale_a"), (tuple, list))


def _scales(arguments: Arguments) -> tuple[Any, Any]:
    if not _second_version(arguments):
        return arguments.argument(2, "scale_a"), arguments.argument(3, "scale_b")
    one, two = arguments.argument(2, "scale_a"), arguments.argument(5, "scale_b")
    return (one[0], two[0]) if len(one) == len(two) == 1 else (None, None)


@axis_rule(torch.einsum)
def einsum_axes(call: AxisCall) -> Effect:
    """Maps letters of the result and sums over the others."""
    equation, operands = call.args[0], call.inputs
    terms, _, result = str(equation).replace(" ", "").partition("->")
    letters = terms.split(",")
    plain = "->" in str(equation) and "." not in terms and all(len(set(term)) == len(term) for term in letters)
    if not plain or len(letters) != len(operands):
        return opaque(call, "only products of named axes, each once per factor, have an axis rule")
    axes: dict[str, Axis] = {}
    for term, operand in zip(letters, operands, strict=True):
        for letter, axis in zip(term, operand.layout, strict=True):
            if axis is not None:
                axes[letter] = call.axes.unify(axes[letter], axis) if letter in axes else axis
    if len({call.axes.find(axis) for axis in axes.values()}) < len(axes):
        return opaque(call, "one axis stands under two letters")
    kept = tuple(axes.get(letter) for letter in result)
    said = claims(kept, Behaviour.MAP, "each of its facts is multiplied on its own")
    summed = (axis for letter, axis in axes.items() if letter not in result)
    why = "each shard yields a partial sum of the products"
    said += claims(summed, Behaviour.REDUCE, why, role="inner", produced=False)
    return Effect(tuple(said), (kept,))
