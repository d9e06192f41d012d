"""Linear maps and matrix products."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, aligned, axis_rule, claims, opaque
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.registry import Call, erases, labels, other_operand, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.verdict import REFINED, Verdict


@labels(nn.Linear, F.linear, "transformers.pytorch_utils.Conv1D")
def linear(call: Call) -> Verdict:
    """A linear map by a static weight: S unless it contracts."""
    if call.module is None and call.is_dynamic(call.argument(1, "weight")):
        return unproven("the weight is itself dynamic")
    return linear_map(call, call.before.shape[-1], call.value.shape[-1])


def linear_map(call: Call, width: int | torch.SymInt, out: int | torch.SymInt, maps: int | None = None) -> Verdict:
    """Return the verdict of a full-rank linear map from `width` to `out` dimensions.

    Args:
        call: The node.
        width: Dimensions before the map.
        out: Dimensions after it.
        maps: How often it is applied per sample; by default once for each vector of the first dynamic operand.
    """
    if isinstance(width, torch.SymInt) or isinstance(out, torch.SymInt):
        return unproven("its width varies with the batch")
    if out >= width:
        how = "is square" if out == width else "expands"
        return preserves(
            f"{width} → {out} {how}, so the pseudo-inverse rebuilds the operand if the weight has full rank; "
            "shapes cannot show that, certify does",
            confidence=REFINED,
        )
    maps = _vectors(call, width) if maps is None else maps
    lost = None if maps is None else maps * (width - out)
    return erases(f"{width} → {out} contracts and erases {width - out} of {width} dimensions", lost, confidence=REFINED)


def _vectors(call: Call, width: int) -> int | None:
    total = call.elements()
    return None if total is None or width == 0 else total // width


@labels(operator.matmul, ops="matmul mm bmm")
def matmul(call: Call) -> Verdict:
    """A product of two matrices; the factor at hand must have more rows (or columns) than the other has to rebuild."""
    left, right = call.argument(0, "input"), call.argument(1, "other", call.node.kwargs.get("mat2"))
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return unproven("its factors are not both tensors")
    a, b = left.meta["val"], right.meta["val"]
    if min(a.dim(), b.dim()) < 2:
        return unproven("a product with a vector is covered by no rule")
    if call.is_dynamic(left) and call.is_dynamic(right):
        return _product(call, left, right)
    if call.is_dynamic(left):
        return linear_map(call, a.shape[-1], b.shape[-1])
    return linear_map(call, b.shape[-2], a.shape[-2])


def _product(call: Call, left: fx.Node, right: fx.Node) -> Verdict:
    a, b = left.meta["val"], right.meta["val"]
    rows, inner, columns = as_int(a.shape[-2]), as_int(a.shape[-1]), as_int(b.shape[-1])
    if left is right or rows is None or inner is None or columns is None:
        return unproven("one matrix is multiplied with itself, or its sizes vary with the batch")
    if columns > inner or rows > inner:
        witness, rebuilt = (right, left) if columns > inner else (left, right)
        return preserves(
            f"{rows}×{inner} by {inner}×{columns}: solving with {witness.name} rebuilds {rebuilt.name} if it has full "
            "rank; shapes cannot show that, certify does",
            other_operand(witness),
            REFINED,
        )
    if rows == inner == columns:
        return unproven("whether a square matrix of activations can be inverted depends on the data")
    # A square factor of activations (attention probabilities) is near singular in practice, so it is no witness.
    side, width, out = (a, inner, columns) if columns < inner else (b, inner, rows)
    total = elements(side)
    lost = None if total is None else total // width * (width - out)
    return erases(
        f"{rows}×{inner} by {inner}×{columns} contracts, so neither factor rebuilds the other", lost, confidence=REFINED
    )


@labels(torch.addmm)
def fused_product(call: Call) -> Verdict:
    """A product with a summand: the static-weight form `addmm(bias, x, weight)` is a linear map."""
    bias, left, right = call.argument(0, "input"), call.argument(1, "mat1"), call.argument(2, "mat2")
    if call.is_dynamic(bias) or call.is_dynamic(right) or not isinstance(right, fx.Node):
        return unproven("only a static bias and weight are covered")
    return linear_map(call, left.meta["val"].shape[-1], right.meta["val"].shape[-1])


@axis_rule(nn.Linear, F.linear, "transformers.pytorch_utils.Conv1D")
def linear_axes(call: AxisCall) -> Effect:
    """Maps everything but the input features, whose products are partial sums."""
    *leading, inner = call.operand.layout
    (outer,) = call.axes.fresh(call.shape[-1:])
    call.axes.call(inner, "feature")
    call.axes.call(outer, "feature")
    said = claims(leading, Behaviour.MAP, "the same weight serves each vector on its own")
    said += summed(inner, role="input")
    why = "each shard of the weight yields outputs of its own"
    said += claims([outer], Behaviour.MAP, why, role="output", consumed=False)
    return Effect(tuple(said), ((*leading, outer),))


def summed(axis: Axis | None, role: str) -> list[Claim]:
    """Return the claim on an axis that a product sums over."""
    why = "each shard yields a partial sum of the products"
    return claims([axis], Behaviour.REDUCE, why, role=role, produced=False)


@axis_rule(operator.matmul, methods="__matmul__", ops="matmul mm bmm")
def matmul_axes(call: AxisCall) -> Effect:
    """Maps rows and columns, sums the inner axis, and waits where one axis is both rows and columns."""
    left, right = call.inputs[0], call.inputs[-1]
    if min(left.rank, right.rank) < 2:
        return opaque(call, "products with vectors have no axis rule")
    said: list[Claim] = []
    *batch, row, column = _product_layout(call, left, right, said)
    if call.axes.overlap([column], [*batch, row]):
        # Rows and columns are the same facts, as queries and keys are: columns need an identity of their own.
        said += _gathered(column, right, "every row meets every column of the same axis", "column")
        column = call.axes.new("key")
    why = "each shard of the columns yields columns of the result"
    said += claims([column], Behaviour.MAP, why, role="column", consumed=column == right.layout[-1])
    said += _inner_claims(call, left, right, [*batch, row])
    return Effect(tuple(said), ((*batch, row, column),))


def _product_layout(call: AxisCall, left: Value, right: Value, said: list[Claim]) -> list[Axis | None]:
    """Return the axes of a matrix product, and say what it does to all of them but the columns."""
    batch, clashes = aligned(call.axes, [left.layout[:-2], right.layout[:-2]], len(call.shape) - 2)
    row = left.layout[-2]
    said += claims(batch, Behaviour.MAP, "each matrix of the batch is multiplied on its own")
    said += claims([row], Behaviour.MAP, "each row of the first matrix meets all of the second", role="row")
    said += clashes
    return [*batch, row, right.layout[-1]]


def _inner_claims(call: AxisCall, left: Value, right: Value, kept: list[Axis | None]) -> list[Claim]:
    mine, theirs = left.layout[-1], right.layout[-2]
    if mine is None or theirs is None:
        return []
    if call.axes.overlap([theirs], kept):
        why = "every row sums over all of this axis, along which the rows are sharded too"
        return [*summed(mine, role="inner"), *_gathered(theirs, right, why, "inner")]
    if call.axes.relabelled(mine, theirs):
        why = "its facts meet others under other indices"
        return [*summed(mine, role="inner"), *_gathered(theirs, right, why, "inner")]
    return summed(call.axes.unify(mine, theirs), role="inner")


def _gathered(axis: Axis | None, value: Value, why: str, role: str) -> list[Claim]:
    return claims([axis], Behaviour.BARRIER, why, role=role, produced=False, moved=value.bytes_per_sample)
